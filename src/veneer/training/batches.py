"""Which rows a step trains on, and rows → tensors.

The step's number decides its rows, so a resumed run needs no saved position but the number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.data.labels import IGNORE, Tokens

_POOL = 50  # batches whose rows are sorted by length together: little padding, and still random batches


class Batch(NamedTuple):
    """Rows padded at the right to one length, (rows, length). A classifier's labels are (rows,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


class Batches:
    """The order of rows over all epochs, a function of the seed."""

    def __init__(self, rows: list[Tokens], batch_size: int, seed: int) -> None:
        self._rows, self._size, self._seed = rows, batch_size, seed
        self.per_epoch = math.ceil(len(rows) / batch_size)
        self._epoch, self._order = -1, [[0]]

    def rows(self, step: int) -> list[Tokens]:
        """The rows of optimizer step ``step`` (from 0)."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._ordered(epoch)
        return [self._rows[index] for index in self._order[place]]

    def _ordered(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self._rows), generator=generator).tolist()
        batches = []
        for start in range(0, len(shuffled), _POOL * self._size):
            pool = sorted(shuffled[start : start + _POOL * self._size], key=lambda i: len(self._rows[i].ids))
            batches += [pool[i : i + self._size] for i in range(0, len(pool), self._size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def by_length(rows: list[Tokens], size: int) -> list[list[Tokens]]:
    """All rows in batches of at most ``size``, rows of like length together, the longest first."""
    ordered = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def collate(rows: list[Tokens], pad: int, *, classes: bool = False) -> Batch:
    """Rows as tensors. ``pad`` fills up; it is neither attended to nor learned, whatever token it is."""
    ids = _padded([row.ids for row in rows], pad)
    mask = _padded([[1] * len(row.ids) for row in rows], 0)
    if classes:
        return Batch(ids, mask, torch.tensor([row.labels[0] for row in rows]))
    return Batch(ids, mask, _padded([row.labels for row in rows], IGNORE))


def _padded(lists: list[list[int]], value: int) -> Tensor:
    width = max(len(items) for items in lists)
    return torch.tensor([items + [value] * (width - len(items)) for items in lists])
