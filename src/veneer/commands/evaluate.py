"""A finished run measured: base and adapter side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.arguments import folder_given
from veneer.commands.card import put_scores
from veneer.data.bad import BadRows
from veneer.data.columns import Reading
from veneer.data.formats import Example
from veneer.data.metrics import metric_of
from veneer.data.sources import refuse_weights
from veneer.device import device_of
from veneer.errors import DataError
from veneer.evaluation.answers import answered, spread
from veneer.evaluation.compare import Comparison, compare
from veneer.evaluation.config import EvaluateOptions
from veneer.files import write_text
from veneer.frozen.layers import computing_said
from veneer.options import shows
from veneer.runs.folder import RunFolder
from veneer.runs.opened import Opened, base_of_run, open_named, open_run
from veneer.runs.prepare import Prepared
from veneer.runs.reading import kept_reading
from veneer.runs.rows import read_examples
from veneer.updates.peft_config import CONFIG_NAME as ADAPTER_CONFIG

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from veneer.runs.arguments import EvaluateArguments


@shows(EvaluateOptions, EvaluateOptions.model_fields)
def evaluate(run: str | Path, **options: Unpack[EvaluateArguments]) -> Comparison:
    """Measure a finished run's base and adapter on its held-out rows, or on others; the figures are written to its
    evaluation.json, too, and those of its held-out rows to the model card beside its result.

    ``run``: a run's folder, or an adapter's folder alone, into which nothing is written. ``options``: those of
    `EvaluateOptions`, of which ``data`` names the other rows, which an adapter alone needs. Raises ConfigError for an
    option that does not exist or makes no sense, DataError for rows that cannot be read or are not given, and
    TrainingError for a folder that is neither.

    Example:
        >>> result = veneer.train(
        ...     "tiny", data="rows.jsonl", output="runs/seen", steps=20, learning_rate=1e-2, console=quiet
        ... )
        >>> comparison = veneer.evaluate("runs/seen", data="rows.jsonl", examples=0)
        >>> comparison.adapter.loss < comparison.base.loss
        True
    """
    folder, asked = folder_given("evaluate", run, "run"), EvaluateOptions(**options)
    if (folder / ADAPTER_CONFIG).is_file() and not RunFolder(folder).exists:
        return _of_adapter(folder, asked)
    RunFolder(folder).refuse_missing()
    opened: Opened | Prepared
    seen: Sequence[Example] = []
    if asked.data:
        rows, notes = _other_rows(folder, asked)
        opened = open_named(folder, asked.compute, asked.device)
    else:
        opened = open_run(folder, asked.compute, asked.device)
        rows, seen, notes = opened.held_out, opened.train, []
    if not len(rows):
        raise DataError(f"{folder} was trained without held-out rows; give some with --data.")
    if "leave-out" in (asked.bad_rows, RunFolder(folder).config().bad_rows):
        rows, seen, more = _usable(opened, rows, seen)
        notes += more
    comparison = _measured(opened, rows, seen, asked, base_of_run(folder, str(device_of(opened.model))))
    comparison = replace(comparison, note=_both(*notes, comparison.note))
    write_text(RunFolder(folder).evaluation_file, json.dumps(comparison.as_json(), indent=2) + "\n")
    if asked.data:
        return comparison
    return replace(comparison, note=_both(comparison.note, put_scores(RunFolder(folder), comparison)))


def _both(*notes: str) -> str:
    return "\n".join(note for note in notes if note)


def _of_adapter(folder: Path, asked: EvaluateOptions) -> Comparison:
    if not asked.data:
        raise DataError(f"{folder} is an adapter alone, without the rows of its run; give rows with --data.")
    rows, notes = _other_rows(folder, asked)
    opened = open_named(folder, asked.compute, asked.device)
    if asked.bad_rows == "leave-out":
        rows, _, more = _usable(opened, rows, [])
        notes += more
    comparison = _measured(opened, rows, [], asked, None)
    return replace(comparison, note=_both(*notes, comparison.note))


def _other_rows(folder: Path, asked: EvaluateOptions) -> tuple[Sequence[Example], list[str]]:
    """The rows of ``data``, read as those of the run were where nothing else is asked, and what to say of them."""
    refuse_weights(str(asked.data), "where rows are measured")
    bad = BadRows()
    examples = read_examples(str(asked.data), Reading.of(asked, kept_reading(folder)), bad)
    if asked.bad_rows == "stop":
        bad.refuse()
    return examples.items, [*examples.notes(), *bad.sentences()]


def _usable(
    opened: Opened | Prepared, rows: Sequence[Example], seen: Sequence[Example]
) -> tuple[Sequence[Example], Sequence[Example], list[str]]:  # fmt: skip
    """The rows that the template takes, to measure and seen in training; and what to say of the others."""
    bad, others = BadRows(), BadRows()
    return opened.renderer.usable(rows, bad), opened.renderer.usable(seen, others), bad.sentences()


def _measured(
    opened: Opened | Prepared, rows: Sequence[Example], seen: Sequence[Example], asked: EvaluateOptions,
    base: Any | None,
) -> Comparison:  # fmt: skip
    comparison = compare(
        opened.model, opened.renderer, rows, base=base, seen=seen, exact_match=asked.exact_match,
        metrics=[metric_of(name) for name in asked.metrics], batch_size=asked.batch_size,
    )  # fmt: skip
    examples = answered(opened.model, opened.renderer, spread(rows, asked.examples), asked.batch_size, base=base)
    note = _both(*computing_said(opened.model), comparison.note)
    return replace(comparison, examples=examples, data=asked.data, note=note)
