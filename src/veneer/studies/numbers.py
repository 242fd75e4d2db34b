"""Means, spreads and standard errors of rows, and how they are written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from veneer.studies.study import Row
from veneer.training.curve import above_largest


@dataclass(frozen=True)
class Metric:
    """What rows are compared by: the accuracy where they have one, else the loss."""

    column: str  # accuracy or loss

    @classmethod
    def of(cls, rows: list[Row]) -> Metric:
        return cls("accuracy" if rows and all(row["accuracy"] is not None for row in rows) else "loss")

    def best(self, values: dict[Any, float]) -> Any:
        """The name of the best value; of equal ones the first."""
        return (max if self.column == "accuracy" else min)(values, key=lambda name: values[name])

    def within(self, value: float, best: float, margin: float) -> bool:
        """Whether a value is no worse than ``best`` by more than ``margin``; one that is not known is none."""
        margin = 0.0 if math.isnan(margin) else margin
        return value >= best - margin if self.column == "accuracy" else value <= best + margin

    def values(self, rows: list[Row]) -> list[float]:
        return [float(row[self.column]) for row in rows]

    def shown(self, values: list[float]) -> str:
        """Mean ± spread of the values, in per cent where they are shares."""
        spread = f" ± {self.number(statistics.stdev(values))}" if len(values) > 1 else ""
        return f"{self.number(statistics.mean(values))}{spread}{self.unit}"

    def number(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.column == "accuracy" else f"{value:.3f}"

    def standard_error(self, groups: list[list[float]], held_out: int) -> float:
        """The standard error of one group's mean, by the spread that all groups have in common: with few seeds a single
        group's own is chance.

        With one seed: that of a share over so many held-out rows, and NaN for a loss.
        """
        spreads = [statistics.variance(values) for values in groups if len(values) > 1]
        if spreads:
            return math.sqrt(statistics.mean(spreads) / min(len(values) for values in groups))
        if self.column != "accuracy":
            return math.nan
        best = max(values[0] for values in groups)
        return math.sqrt(best * (1 - best) / held_out)

    @property
    def unit(self) -> str:
        return " %" if self.column == "accuracy" else ""

    def margin(self, error: float) -> str:
        """A standard error with its unit."""
        return "not known with one seed" if math.isnan(error) else f"{self.number(error)}{self.unit}"

    @property
    def name(self) -> str:
        return f"held-out {self.column}"

    @property
    def title(self) -> str:
        """The title of an axis."""
        return f"{self.name}, %" if self.column == "accuracy" else self.name

    @property
    def factor(self) -> float:
        """What a value is multiplied by where it is drawn."""
        return 100.0 if self.column == "accuracy" else 1.0


_Name = TypeVar("_Name")


def unlearned(groups: Mapping[_Name, list[Row]]) -> list[_Name]:
    """The groups of rows whose accuracy is on average not above the share of the largest class: always naming that one
    would do as well. Rows without either number are not judged."""
    names = []
    for name, rows in groups.items():
        pairs = [(row.get("accuracy"), row.get("largest_class")) for row in rows]
        known = [(share, largest) for share, largest in pairs if share is not None and largest is not None]
        if known and not above_largest(*map(statistics.mean, zip(*known, strict=True))):
            names.append(name)
    return names


def best_learned(metric: Metric, means: Mapping[str, float], unlearned: Iterable[str]) -> str:
    """The best of those that learned; "" where none has."""
    learned = {name: mean for name, mean in means.items() if name not in set(unlearned)}
    return str(metric.best(learned)) if learned else ""


def best_and_level(
    metric: Metric, means: Mapping[str, float], error: float, unlearned: Iterable[str]
) -> tuple[str, list[str]]:
    """The best of those that learned, and those within ``error`` of it; "" and none where none has learned."""
    behind = set(unlearned)
    best = best_learned(metric, means, behind)
    if not best:
        return "", []
    near = [name for name in means if name not in behind and metric.within(means[name], means[best], error)]
    return best, [name for name in near if name != best]


def not_recommended(names: Iterable[str]) -> str:
    """A sentence that names what has not learned, with a space before it; nothing where all have."""
    listed = ", ".join(names)
    return f" Not above the share of the largest class, and so not recommended: {listed}." if listed else ""


def grouped(rows: Iterable[Row], by: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a value, in the order in which the values come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups
