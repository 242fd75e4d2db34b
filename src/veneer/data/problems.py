"""What a row answers to what a classifier is asked, as the labels of `Tokens`: its class, its labels, or its number."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from veneer.data.formats import Example, class_of, labels_in
from veneer.errors import DataError, did_you_mean
from veneer.models.problems import Problem


def target_of(example: Example, problem: Problem, classes: Sequence[str]) -> list[int]:
    """The labels of an example's tokens: the number of its class; a 1 or 0 for each class; or the bits of its number in
    fp32, which are none that stand for a label that is ignored.

    Raises DataError for a label that is none of ``classes``, or no number.

    >>> target_of(Example("rows:1", prompt="t", labels=("b", "c")), "multi-label", ["a", "b", "c"])
    [0, 1, 1]
    """
    if problem == "regression":
        return [_bits(number_of(example), example.where)]
    names = labels_in(example) if problem == "multi-label" else (class_of(example),)
    for name in names:
        if name not in classes:
            raise DataError(
                f"{example.where} has the label {name!r}, which is not one of the model's: {', '.join(classes)}."
                f"{did_you_mean(name, classes)}"
            )
    if problem == "multi-label":
        return [int(name in names) for name in classes]
    return [classes.index(names[0])]


def number_of(example: Example) -> float:
    """The number that is an example's label. Raises DataError where it is none."""
    text = class_of(example)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or example.labels is not None:
        raise DataError(f"{example.where} has the label {text!r}, which is no number; task: regression learns numbers.")
    return number


def _bits(number: float, where: str) -> int:
    try:
        bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    except OverflowError:
        raise DataError(f"{where} has the label {number:g}, which is too large for a number in 32 bits.") from None
    return bits
