"""Which rows a step trains on, and rows → tensors.

The step's number decides its rows, so a resumed run needs no saved position but the number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer.data.pairs import borders_of
from veneer.data.token_rows import IGNORE, Tokens, label_lengths_of, lengths_of
from veneer.models.problems import Problem

_POOL = 50  # batches whose rows are sorted by length together: little padding, and still random batches


class Batch(NamedTuple):
    """Rows padded at the right to one length, (rows, length). A classifier's labels are those of its problem: the
    classes (rows,), the numbers (rows,) fp32, or which labels each row has (rows, labels) fp32."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


class Lengths(NamedTuple):
    """The tokens of a row that are counted and not read."""

    ids: range
    labels: range
    border: int = 0  # where the second sequence of a pair begins

    def sequences(self) -> list[Lengths]:
        """Those of what passes through the model by itself, as `pairs.sequences`."""
        if not self.border:
            return [self]
        first, second = slice(self.border), slice(self.border, None)
        return [Lengths(self.ids[part], self.labels[part]) for part in (first, second)]


class Batches:
    """The order of rows over all epochs, a function of the seed.

    All rows are shuffled again in each epoch; those of fifty steps in a row are then sorted by length, so that a step's
    rows are of like length, and these steps are shuffled with all others. Only lengths are in memory, not the tokens.
    """

    def __init__(self, rows: Sequence[Tokens], batch_size: int, seed: int) -> None:
        self._rows, self._size, self._seed = rows, batch_size, seed
        self._lengths, self._labels, self._borders = lengths_of(rows), label_lengths_of(rows), borders_of(rows)
        self.per_epoch = math.ceil(len(rows) / batch_size)
        self._epoch = -1
        self._order = self._steps = numpy.zeros(0, numpy.int64)

    def rows(self, step: int) -> list[Tokens]:
        """The rows of optimizer step ``step`` (from 0)."""
        return [self._rows[number] for number in self._numbers(step)]

    def lengths(self, step: int) -> list[Lengths]:
        """How long these rows are."""
        return [
            Lengths(range(self._lengths[number]), range(self._labels[number]), int(self._borders[number]))
            for number in self._numbers(step)
        ]

    def _numbers(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order, self._steps = self._ordered(epoch)
        start = int(self._steps[place]) * self._size
        numbers: list[int] = self._order[start : start + self._size].tolist()
        return numbers

    def _ordered(self, epoch: int) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
        """(rows,) numbers of rows, as many as a step takes after one another; (steps,) which of these a step takes."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._rows), generator=generator).numpy()
        for start in range(0, len(order), _POOL * self._size):
            pool = order[start : start + _POOL * self._size]
            pool[:] = pool[numpy.argsort(self._lengths[pool], kind="stable")]
        return order, torch.randperm(self.per_epoch, generator=generator).numpy()


def by_length(rows: Sequence[Tokens], size: int) -> Iterator[list[Tokens]]:
    """All rows in batches of at most ``size``, rows of like length together, the longest first."""
    ordered = numpy.argsort(-lengths_of(rows), kind="stable").tolist()
    for start in range(0, len(ordered), size):
        yield [rows[number] for number in ordered[start : start + size]]


def collate(rows: Sequence[Tokens], pad: int, *, problem: Problem | None = None) -> Batch:
    """Rows as tensors. ``pad`` fills up; it is neither attended to nor learned, whatever token it is. ``problem``: of
    rows for a classifier."""
    ids = _padded([row.ids for row in rows], pad)
    mask = _padded([[1] * len(row.ids) for row in rows], 0)
    if problem == "multi-label":
        return Batch(ids, mask, torch.tensor([row.labels for row in rows], dtype=torch.float32))
    if problem is not None:
        first = torch.tensor([row.labels[0] for row in rows])
        return Batch(ids, mask, first.int().view(torch.float32) if problem == "regression" else first)
    return Batch(ids, mask, _padded([row.labels for row in rows], IGNORE))


def _padded(lists: list[list[int]], value: int) -> Tensor:
    width = max(len(items) for items in lists)
    return torch.tensor([items + [value] * (width - len(items)) for items in lists])
