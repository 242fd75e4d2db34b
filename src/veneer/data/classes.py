"""The classes of a classifier's rows, looked at before a model is made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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


def counted_classes(classes: dict[str, int]) -> str:
    """Each class and its rows, the most frequent first: "no 120, yes 80"."""
    ordered = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
    more = f", and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(f"{name} {rows:,}" for name, rows in ordered[:_SHOWN]) + more
