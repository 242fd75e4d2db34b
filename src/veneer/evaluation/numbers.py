"""Numbers that a model gives, against the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

_Numbers = NDArray[numpy.float64]


@dataclass(frozen=True)
class NumberScores:
    """None where it is not defined: R² where all right numbers are the same, a correlation where either side's are."""

    mse: float  # mean squared error
    mae: float  # mean absolute error
    r2: float | None  # 1 − Σ (right − given)² / Σ (right − mean of right)²: 0 is as good as always giving the mean
    pearson: float | None  # correlation of the numbers
    spearman: float | None  # and of their ranks, equal numbers sharing a mean rank

    @classmethod
    def of(cls, right: Sequence[float], given: Sequence[float]) -> NumberScores:
        """In fp64.

        Example:
            >>> scores = NumberScores.of([1.0, 2.0, 3.0], [1.5, 2.0, 2.5])
            >>> round(scores.mse, 3), scores.r2, round(scores.pearson, 6), round(scores.spearman, 6)
            (0.167, 0.75, 1.0, 1.0)
        """
        wanted, found = numpy.asarray(right, numpy.float64), numpy.asarray(given, numpy.float64)
        away = wanted - found
        spread = float(((wanted - wanted.mean()) ** 2).sum())
        return cls(
            float((away**2).mean()), float(numpy.abs(away).mean()),
            1 - float((away**2).sum()) / spread if spread else None,
            _correlation(wanted, found), _correlation(_ranks(wanted), _ranks(found)),
        )  # fmt: skip

    def lines(self) -> list[tuple[str, float | None]]:
        """(what it is called, its value)"""
        return [
            ("mean squared error", self.mse), ("mean absolute error", self.mae), ("R²", self.r2),
            ("Pearson correlation", self.pearson), ("Spearman correlation", self.spearman),
        ]  # fmt: skip


def _correlation(one: _Numbers, other: _Numbers) -> float | None:
    one, other = one - one.mean(), other - other.mean()
    size = float(numpy.sqrt((one**2).sum()) * numpy.sqrt((other**2).sum()))
    return float((one * other).sum()) / size if size else None


def _ranks(numbers: _Numbers) -> _Numbers:
    """(n,) the place of each in their order, from 1; of equal ones the mean of their places."""
    _, groups, counts = numpy.unique(numbers, return_inverse=True, return_counts=True)
    last: _Numbers = numpy.cumsum(counts).astype(numpy.float64)
    ranks: _Numbers = (last - (counts - 1) / 2)[groups]
    return ranks
