"""Measures of answers: those with names, by the libraries that others report them with, and functions of one's own.

No torch here, and no library before it is used.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.data.formats import Example, asked_text, named_labels
from veneer.errors import ConfigError, DataError, did_you_mean, shown

_ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
NAMES = ("exact", *_ROUGE, "bleu")
_PLACE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # package.module:function
Predicted = Any  # a text; of a model of several labels a tuple of these, of a regression a number


@dataclass(frozen=True)
class Metric:
    """``of``: predictions and the rows that they are for → the measure of all."""

    name: str
    of: Callable[[Sequence[Predicted], Sequence[Example]], float]
    higher_is_better: bool = True


def check_metric(name: str) -> str:
    """``name``, if it is one of `NAMES` or of the form package.module:function. Raises ValueError."""
    if name not in NAMES and not _PLACE.fullmatch(name):
        raise ValueError(
            f"{name!r} is no metric: it is one of {', '.join(NAMES)}, or a function by package.module:function."
            f"{did_you_mean(name, NAMES)}"
        )
    return name


def check_metrics(names: list[str]) -> list[str]:
    """`check_metric` of several, each named once. Raises ValueError."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is named twice.")
    return [check_metric(name) for name in names]


def metric_of(name: str) -> Metric:
    """The metric of this name, ready to measure. Raises ConfigError where a library or a function is missing."""
    if name == "exact":
        return Metric(name, _exact)
    if name in _ROUGE:
        return Metric(name, _rouge(name))
    if name == "bleu":
        return Metric(name, _bleu())
    function = _imported(name)
    return Metric(name, _mean_of(name, function), bool(getattr(function, "higher_is_better", True)))


def row_of(example: Example) -> dict[str, Any]:
    """What a function of one's own is given as the row: where it stands, what is asked, the right answer; of a
    conversation the messages before the answer, and of several labels these."""
    return {
        "where": example.where,
        "prompt": asked_text(example).strip(),
        "answer": example.last_answer(),
        "messages": [dict(message) for message in example.asked()] if example.messages else None,
        "labels": None if example.labels is None else list(example.labels),
    }


def _text(prediction: Predicted) -> str:
    return named_labels(prediction) if isinstance(prediction, tuple) else str(prediction)


def _exact(predictions: Sequence[Predicted], rows: Sequence[Example]) -> float:
    """The share of the rows whose answer is given letter by letter, apart from space around it."""
    pairs = zip(predictions, rows, strict=True)
    return sum(_text(said).strip() == row.last_answer() for said, row in pairs) / len(rows)


def _rouge(name: str) -> Callable[[Sequence[Predicted], Sequence[Example]], float]:
    """The mean F1 of Google's rouge-score, without stemming (Lin, 2004)."""
    scorer = _library("rouge_score.rouge_scorer", "rouge-score", name).RougeScorer([_ROUGE[name]])

    def mean(predictions: Sequence[Predicted], rows: Sequence[Example]) -> float:
        answers = [row.last_answer() for row in rows]
        if not any(re.search("[a-z0-9]", answer.lower()) for answer in answers):
            raise DataError(
                f"{name} counts words of the letters a to z and digits alone, as rouge-score does, and no right answer "
                f"has one; the first is at {rows[0].where}. Leave {name} out, or take a function of your own."
            )
        pairs = zip(answers, predictions, strict=True)
        scores = [float(scorer.score(answer, _text(said))[_ROUGE[name]].fmeasure) for answer, said in pairs]
        return sum(scores) / len(scores)

    return mean


def _bleu() -> Callable[[Sequence[Predicted], Sequence[Example]], float]:
    """BLEU of all rows together, from 0 to 100, by sacrebleu with its defaults (Papineni et al., 2002; Post, 2018)."""
    sacrebleu = _library("sacrebleu", "sacrebleu", "bleu")

    def of_all(predictions: Sequence[Predicted], rows: Sequence[Example]) -> float:
        answers = [row.last_answer() for row in rows]
        return float(sacrebleu.corpus_bleu([*map(_text, predictions)], [answers]).score)

    return of_all


def _library(module: str, package: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"The metric {name} needs the package {package}, which is not installed: pip install 'veneer[metrics]'."
        ) from None


def _mean_of(name: str, function: Callable[..., Any]) -> Callable[[Sequence[Predicted], Sequence[Example]], float]:
    def mean(predictions: Sequence[Predicted], rows: Sequence[Example]) -> float:
        return sum(_of_row(name, function, *pair) for pair in zip(predictions, rows, strict=True)) / len(rows)

    return mean


def _of_row(name: str, function: Callable[..., Any], prediction: Predicted, row: Example) -> float:
    """Raises DataError, with the row, for what the function raises, and for what is no number."""
    try:
        value = function(prediction, row_of(row))
    except Exception as error:
        raise DataError(
            f"The metric {name} failed at {row.where}: {type(error).__name__}: {shown(str(error))}"
        ) from None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"The metric {name} gave {shown(repr(value))} at {row.where}, which is no finite number.")
    return number


def _imported(name: str) -> Callable[..., Any]:
    """The function, from a package or from a file in the working folder."""
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name is not None and f"{module}.".startswith(
            f"{error.name}."
        )  # fmt: skip
        why = "there is no such module" if missing else f"{type(error).__name__}: {shown(str(error))}"
        raise ConfigError(f"The metric {name} cannot be imported: {why}.") from None
    finally:
        sys.path.remove(here)
    found = getattr(loaded, function, None)
    if not callable(found):
        functions = [each for each, value in vars(loaded).items() if callable(value)]
        raise ConfigError(f"{module} has no function {function!r} for a metric.{did_you_mean(function, functions)}")
    return found  # type: ignore[no-any-return]
