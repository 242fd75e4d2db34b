"""The rows of a run that is planned before its model is loaded: they are read, rendered and put into steps as a run
does, by the tokenizer and the config alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.data.pairs import longest_sequence
from veneer.models.checkpoint import Checkpoint
from veneer.planning.empty import Base
from veneer.planning.fit import how_by_shapes
from veneer.planning.plan import base_asked
from veneer.runs.folder import RunFolder
from veneer.runs.own_tokens import kept_tokenizer
from veneer.runs.prepare import renderer_by_config, tokenizer_of_rows
from veneer.runs.rows import Given, Steps, Work, in_steps, problem_asked, read_split
from veneer.runs.start import start_adapter
from veneer.training.config import TrainConfig
from veneer.training.loss import How


@dataclass(frozen=True)
class PlanRows:
    """The rows in their steps, and the base that they are passed through."""

    base: Base
    steps: Steps
    how: How
    work: Work
    notes: list[str]  # what the user should know of the rows, as sentences

    def known(self) -> dict[str, Any]:
        """What `plan` takes of them, as a run gives it just before it trains."""
        return {"base": self.base, "rows": self.work.largest, "how": self.how, "steps": self.steps.total}

    def as_json(self) -> dict[str, int]:
        """Numbers of rows; and the tokens of the longest one."""
        reports = self.steps.reports
        return {
            "train": len(self.steps.rows),
            "held_out": len(self.steps.held_out),
            "longest": longest_sequence(self.steps.rows),
            "cut": sum(len(report.cut) for report in reports),
            "left_out": sum(len(report.left_out) + len(report.dropped) for report in reports),
        }


def rows_of_plan(config: TrainConfig, given: Given) -> PlanRows:
    """The rows that ``config`` names, or that are ``given`` under that name.

    Raises DataError where they cannot be used, ModelError where there is no such model, or none that can be planned.
    """
    checkpoint = Checkpoint(RunFolder(config.output).base_source(config) if config.output else config.model)
    start = start_adapter(config)
    has_classes = start is not None and bool(start.own_classes())
    rows = read_split(config, given, problem_asked(config, checkpoint), has_classes=has_classes)
    headed = config.model_copy(update={"task": rows.problem or config.task})
    base = base_asked(headed, checkpoint, rows.classes if start is None else start.classes(rows))
    kept = kept_tokenizer(RunFolder(config.output)) if config.output else None
    kept = kept or (start and start.tokenizer()) or checkpoint.tokenizer()
    tokenizer, form_notes = tokenizer_of_rows(kept, config, rows.shape, base.config)
    renderer = renderer_by_config(base.config, base.kind == "classification", tokenizer, config)
    steps = in_steps(renderer, rows.train, rows.held_out, config, base.config, {})
    how = how_by_shapes(base, steps.rows[0])
    notes = rows.notes + form_notes + steps.sentences(renderer.max_length)
    return PlanRows(base, steps, how, steps.work(base.kind, how.packed), notes)
