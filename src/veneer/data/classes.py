"""The classes of a classifier's rows, looked at before a model is made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from veneer.data.formats import Example, class_of
from veneer.errors import DataError, did_you_mean

_SHOWN = 12  # classes by name


def classes_of(train: Sequence[Example], held_out: Sequence[Example]) -> dict[str, int]:
    """Class → rows of either side, by name. Rows without an answer have no class.

    Raises DataError where there are fewer than two classes, or where a held-out row has one that no training row has.
    """
    known = Counter(name for example in train if (name := class_of(example)))
    if len(known) < 2:
        one = f"the class {next(iter(known))!r}" if known else "no class"
        raise DataError(f"All {len(train)} training rows have {one}; a classifier needs rows of two classes or more.")
    for example in held_out:
        name = class_of(example)
        if name and name not in known:
            raise DataError(
                f"{example.where} has the label {name!r}, which no training row has; these have "
                f"{counted_classes(known)}.{did_you_mean(name, known)}"
            )
    both = known + Counter(name for example in held_out if (name := class_of(example)))
    return dict(sorted(both.items()))


def weights_of(
    asked: Literal["balanced"] | Mapping[str, float], classes: Sequence[str], train: Sequence[Example]
) -> tuple[dict[str, float], str]:  # fmt: skip
    """Class → its weight in the loss, in the order of ``classes``, and a sentence about them.

    ``asked``: weights by name, of which a class that is not named has 1; or balanced, rows / (classes × rows of the
    class), as scikit-learn's ``compute_class_weight`` has it. Raises DataError for a name that is no class.
    """
    counts = Counter(class_of(example) for example in train)
    if asked == "balanced":
        there = sum(count > 0 for count in counts.values())
        weights = {name: len(train) / (there * counts[name]) if counts[name] else 1.0 for name in classes}
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
    return weights, f"Weights of the classes in the loss: {said}{more}."


def counted_classes(classes: dict[str, int]) -> str:
    """Each class and its rows, the most frequent first: "no 120, yes 80"."""
    ordered = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
    more = f", and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(f"{name} {rows:,}" for name, rows in ordered[:_SHOWN]) + more
