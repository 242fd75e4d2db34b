"""A finished run measured: base and adapter side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from veneer.data.formats import to_examples
from veneer.data.read import read_rows
from veneer.errors import DataError
from veneer.evaluation.answers import answered, spread
from veneer.evaluation.compare import Comparison, compare
from veneer.evaluation.config import EvaluateOptions
from veneer.files import write_text
from veneer.runs.folder import RunFolder
from veneer.runs.opened import Opened, base_of_run, open_named, open_run
from veneer.runs.prepare import Prepared


def evaluate_run(folder: Path, options: EvaluateOptions) -> Comparison:
    """Measure a finished run's base and adapter; the figures are written to its evaluation.json, too."""
    RunFolder(folder).refuse_missing()
    opened: Opened | Prepared
    if options.data:
        opened, rows, seen = open_named(folder), to_examples(read_rows(options.data)).items, []
    else:
        opened = open_run(folder)
        rows, seen = opened.held_out, opened.train
    if not rows:
        raise DataError(f"{folder} was trained without held-out rows; give some with --data.")
    base = base_of_run(folder)
    comparison = compare(
        opened.model, opened.renderer, rows, base=base, seen=seen, exact_match=options.exact_match,
        batch_size=options.batch_size,
    )  # fmt: skip
    told = answered(opened.model, opened.renderer, spread(rows, options.examples), options.batch_size, base=base)
    comparison = replace(comparison, examples=told, data=options.data)
    write_text(RunFolder(folder).evaluation_file, json.dumps(comparison.as_json(), indent=2) + "\n")
    return comparison
