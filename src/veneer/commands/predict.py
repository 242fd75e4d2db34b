"""What a run, an adapter or a model answers to rows: labels with their probabilities, or texts."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from veneer.arguments import described
from veneer.data.bad import BadRows
from veneer.data.columns import Reading
from veneer.data.memory import rows_of
from veneer.data.questions import to_questions
from veneer.data.read import read_lines
from veneer.errors import ArgumentError
from veneer.generation.prompts import renderer_for
from veneer.options import shows
from veneer.prediction.config import PredictOptions
from veneer.prediction.output import Output, kept_columns, plain, write_lines
from veneer.prediction.predict import predictions, refuse_taken_output
from veneer.prediction.result import Predictions
from veneer.runs.computing import refuse_other_device, refuse_other_type
from veneer.runs.opened import Opened, open_named
from veneer.runs.prepare import renderer_of
from veneer.runs.reading import kept_reading
from veneer.terminal import terminal
from veneer.updates.record import adapters_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from veneer.runs.arguments import PredictArguments

STDIN = "-"


@shows(PredictOptions, PredictOptions.model_fields)
def predict(
    model: Any, tokenizer: Any = None, *, data: Any, console: Console | None = None,
    **options: Unpack[PredictArguments],
) -> Predictions:  # fmt: skip
    """What a model answers to each row of ``data``: the likeliest label with the probability of each, or a text.

    ``model``: a run's folder, an adapter's, or a model, as for `load`; or a loaded model, with its ``tokenizer``, which
    answers with its active adapters. ``data``: a path or name, or rows in memory: a list of dicts, a
    ``datasets.Dataset``, a pandas or polars frame, or a list of these. A row needs ``messages``, ``prompt``,
    ``instruction`` (and ``input``) or ``text``, and no answer. ``console``: where progress goes, by default standard
    error.

    With ``output`` the rows are written to that file, in their order; while they are computed they are kept beside it,
    and the same call after an interruption goes on from there. The options are those of `PredictOptions`.

    Raises ConfigError for an option that does not exist or does not fit the model, ArgumentError for a model or
    tokenizer that is none, DataError for rows or an output that cannot be used, ModelError for a model that cannot be
    read or a row that does not fit the memory.

    Example:
        >>> result = veneer.train("tiny", data="rows.jsonl", output="runs/asked", steps=20, learning_rate=1e-2,
        ...     console=quiet)
        >>> answers = veneer.predict("runs/asked", data=[{"prompt": "ba:"}, {"prompt": "mo:"}], console=quiet)
        >>> answers.labels
        ('no', 'yes')
        >>> sorted(answers[0].probabilities), round(sum(answers[0].probabilities.values()), 3)
        (['no', 'yes'], 1.0)
        >>> list(answers.to_pandas().columns)
        ['prompt', 'prediction', 'probability_no', 'probability_yes']
    """
    asked = PredictOptions(**options)
    return _predictions(model, tokenizer, data, asked, console or terminal(stderr=True))


def predict_lines(source: str, data: str, console: Console, **options: Any) -> Predictions:
    """As the command does: without an output the rows go to standard output, as JSON lines."""
    asked = PredictOptions(**options)
    result = _predictions(source, None, data, asked, console)
    if asked.output is None:
        lines = io.StringIO()
        kept = [plain(fields, f"row {number}") for number, fields in enumerate(result.rows, start=1)]
        write_lines(lines, [{**fields, **each.columns} for fields, each in zip(kept, result, strict=True)])
        sys.stdout.write(lines.getvalue())
    return result


def _predictions(
    model: Any, tokenizer: Any, data: Any, asked: PredictOptions, console: Console
) -> Predictions:  # fmt: skip
    """What can be refused without the model is refused before it is loaded, which takes a while."""
    path = refuse_taken_output(asked)
    like = kept_reading(model) if isinstance(model, str | Path) else None
    reading, bad = Reading.of(asked, like), BadRows()
    lines = isinstance(data, str) and data == STDIN
    rows = list(read_lines(sys.stdin.buffer.read(), "standard input", bad) if lines else rows_of(data, bad))
    if asked.bad_rows == "stop":
        bad.refuse()
    questions = to_questions(rows, reading=reading, bad=None if asked.bad_rows == "stop" else BadRows())
    kept = kept_columns(questions.rows, asked.keep, ())
    if path:
        Output(path, questions.rows, kept)
    for note in bad.sentences():
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    return predictions(_opened(model, tokenizer, asked.compute, asked.device), rows, asked, console, reading)


def _opened(model: Any, tokenizer: Any, compute: str, device: str) -> Opened:
    if isinstance(model, nn.Module):
        renderer_for("predict", model, tokenizer)  # refuses what is no tokenizer
        refuse_other_type(model, compute)
        refuse_other_device(model, device)
        renderer = renderer_of(model, tokenizer)
        return Opened(model, renderer, bool(adapters_of(model).active), bool(tokenizer.chat_template))
    if not isinstance(model, str | Path):
        raise ArgumentError(f"predict takes a run, an adapter or a model, by path or loaded, not {described(model)}.")
    if tokenizer is not None:
        raise ArgumentError("predict takes a tokenizer with a loaded model; what a path names has its own.")
    return open_named(model, compute, device)
