"""The classes of a classifier's rows, looked at before a model is made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Literal

from veneer.data.formats import Example, labels_in
from veneer.data.problems import number_of
from veneer.errors import DataError, did_you_mean
from veneer.models.problems import ONE_NUMBER, Problem

_SHOWN = 12  # classes by name


def head_for(problem: Problem, train: Sequence[Example], held_out: Sequence[Example]) -> tuple[list[str], str]:
    """The names of a new head's outputs, and what to say of the rows' labels.

    Raises DataError for rows that make none: too few classes, a label that training rows lack, or what is no number.
    """
    if problem == "regression":
        return [*ONE_NUMBER], spread_of_numbers([*map(number_of, chain(train, held_out))])
    classes = classes_of(train, held_out, several=problem == "multi-label")
    if problem == "classification":
        return [*classes], f"{len(classes)} classes: {counted_classes(classes)}."
    none = sum(not labels_in(example) for example in chain(train, held_out))
    without = f" {none:,} {'row has' if none == 1 else 'rows have'} none of them." if none else ""
    return [*classes], f"{len(classes)} labels, any of which a row may have: {counted_classes(classes)}.{without}"


def spread_of_numbers(numbers: Sequence[float]) -> str:
    """A sentence about the numbers that rows have as labels. Raises DataError where they are all the same."""
    low, high = min(numbers), max(numbers)
    if low == high:
        raise DataError(f"All {len(numbers)} rows have the number {low:g}; there is nothing to learn.")
    return f"The labels are numbers from {low:g} to {high:g}, with a mean of {fmean(numbers):.4g}."


def classes_of(train: Sequence[Example], held_out: Sequence[Example], *, several: bool = False) -> dict[str, int]:
    """Class → rows of either side, by name. Rows without an answer have no class. ``several``: whether a row may have
    several labels, or none, so that one label is something to learn.

    Raises DataError where there are fewer than two classes, or where a held-out row has one that no training row has.
    """
    known = Counter(chain.from_iterable(map(labels_in, train)))
    if len(known) < 2 - several or (several and all(len(labels_in(example)) == len(known) for example in train)):
        one = f"the class {next(iter(known))!r}" if known else "no class"
        if several:
            raise DataError(f"All {len(train)} training rows have the same labels; there is nothing to learn.")
        raise DataError(f"All {len(train)} training rows have {one}; a classifier needs rows of two classes or more.")
    for example in held_out:
        for name in labels_in(example):
            if name not in known:
                raise DataError(
                    f"{example.where} has the label {name!r}, which no training row has; these have "
                    f"{counted_classes(known)}.{did_you_mean(name, known)}"
                )
    both = known + Counter(chain.from_iterable(map(labels_in, held_out)))
    return dict(sorted(both.items()))


def weights_of(
    asked: Literal["balanced"] | Mapping[str, float], classes: Sequence[str], train: Sequence[Example],
    *, several: bool = False,
) -> tuple[dict[str, float], str]:  # fmt: skip
    """Class → its weight in the loss, in the order of ``classes``, and a sentence about them.

    ``asked``: weights by name, of which a class that is not named has 1; or balanced, rows / (classes × rows of the
    class), as scikit-learn's ``compute_class_weight`` has it. Where a row may have ``several``, balanced is what the
    documentation of torch's ``BCEWithLogitsLoss`` advises for each label, rows without / rows with it; 1 for a label of
    all rows or of none, from which nothing is learned about the other. Raises DataError for a name that is no class.
    """
    counts = Counter(chain.from_iterable(map(labels_in, train)))
    if asked == "balanced":
        weights = {name: _balanced(len(train), counts, name, several=several) for name in classes}
    else:
        for name in asked:
            if name not in classes:
                raise DataError(
                    f"class_weights names {name!r}, which is none of the classes: {', '.join(classes)}."
                    f"{did_you_mean(name, classes)}"
                )
        weights = {name: float(asked.get(name, 1.0)) for name in classes}
    shown = sorted(classes, key=lambda name: (-counts[name], name))[:_SHOWN]
    more = f", and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    said = ", ".join(f"{name} × {weights[name]:.4g} ({counts[name]:,} rows)" for name in shown)
    of = "labels in the rows that have them" if several else "classes in the loss"
    return weights, f"Weights of the {of}: {said}{more}."


def _balanced(rows: int, counts: Mapping[str, int], name: str, *, several: bool) -> float:
    count = counts.get(name, 0)
    if not count or (several and count == rows):
        return 1.0
    return (rows - count) / count if several else rows / (len(counts) * count)


def counted_classes(classes: dict[str, int]) -> str:
    """Each class and its rows, the most frequent first: "no 120, yes 80"."""
    ordered = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
    more = f", and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(f"{name} {rows:,}" for name, rows in ordered[:_SHOWN]) + more
