"""A finished run measured: base and adapter side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.arguments import folder_given
from veneer.data.formats import to_examples
from veneer.data.read import read_rows
from veneer.errors import DataError
from veneer.evaluation.answers import answered, spread
from veneer.evaluation.compare import Comparison, compare
from veneer.evaluation.config import EvaluateOptions
from veneer.files import write_text
from veneer.options import shows
from veneer.runs.folder import RunFolder
from veneer.runs.opened import Opened, base_of_run, open_named, open_run
from veneer.runs.prepare import Prepared

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from veneer.runs.arguments import EvaluateArguments


@shows(EvaluateOptions, EvaluateOptions.model_fields)
def evaluate(run: str | Path, **options: Unpack[EvaluateArguments]) -> Comparison:
    """Measure a finished run's base and adapter on its held-out rows, or on others; the figures are written to its
    evaluation.json, too.

    ``options``: those of `EvaluateOptions`, of which ``data`` names the other rows. Raises ConfigError for an option
    that does not exist or makes no sense, DataError for rows that cannot be read, and TrainingError for a folder that
    is no finished run.

    Example:
        >>> result = veneer.train(
        ...     "tiny", data="rows.jsonl", output="runs/seen", steps=20, learning_rate=1e-2, console=quiet
        ... )
        >>> comparison = veneer.evaluate("runs/seen", data="rows.jsonl", examples=0)
        >>> comparison.adapter.loss < comparison.base.loss
        True
    """
    folder, asked = folder_given("evaluate", run, "run"), EvaluateOptions(**options)
    RunFolder(folder).refuse_missing()
    opened: Opened | Prepared
    if asked.data:
        opened, rows, seen = open_named(folder), to_examples(read_rows(asked.data)).items, []
    else:
        opened = open_run(folder)
        rows, seen = opened.held_out, opened.train
    if not rows:
        raise DataError(f"{folder} was trained without held-out rows; give some with --data.")
    base = base_of_run(folder)
    comparison = compare(
        opened.model, opened.renderer, rows, base=base, seen=seen, exact_match=asked.exact_match,
        batch_size=asked.batch_size,
    )  # fmt: skip
    examples = answered(opened.model, opened.renderer, spread(rows, asked.examples), asked.batch_size, base=base)
    comparison = replace(comparison, examples=examples, data=asked.data)
    write_text(RunFolder(folder).evaluation_file, json.dumps(comparison.as_json(), indent=2) + "\n")
    return comparison
