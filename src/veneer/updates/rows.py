"""The adapters of each row of one forward pass, and what one thread has put in force for itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Generic, TypeVar

import torch
from torch import Tensor

from veneer.errors import ModelError

Names = tuple[str, ...]  # of adapters that are in force together; none is the base
_T = TypeVar("_T")


class Own(Generic[_T]):
    """A value that a thread has for itself, and only for a while; a copy of this object holds none."""

    def __init__(self) -> None:
        self._of: dict[int, _T] = {}  # by thread

    def get(self) -> _T | None:
        """This thread's."""
        return self._of.get(get_ident()) if self._of else None

    @contextmanager
    def put(self, value: _T) -> Iterator[None]:
        thread = get_ident()  # a generator may be closed by another one
        before = self._of.get(thread)
        self._of[thread] = value
        try:
            yield
        finally:
            if before is None:
                self._of.pop(thread, None)
            else:
                self._of[thread] = before

    def __reduce__(self) -> tuple[type[Own[_T]], tuple[()]]:
        return type(self), ()


class Off(Own[int]):
    """How many blocks a thread has open in which all adapters are off; they may overlap."""

    @contextmanager
    def block(self) -> Iterator[None]:
        thread = get_ident()
        self._of[thread] = self._of.get(thread, 0) + 1
        try:
            yield
        finally:
            self._of[thread] -= 1
            if not self._of[thread]:
                del self._of[thread]


class RowAdapters:
    """Row i of a batch is computed with the adapters ``names[i]``; each row has ``width`` tokens."""

    def __init__(self, names: list[Names], width: int) -> None:
        self.names, self.width = names, width
        self._places: dict[torch.Size, list[tuple[Names, Tensor | None]]] = {}

    def groups(self) -> dict[Names, list[int]]:
        """Adapters → the rows that they compute."""
        groups: dict[Names, list[int]] = {}
        for row, names in enumerate(self.names):
            groups.setdefault(names, []).append(row)
        return groups

    def places(self, shape: torch.Size, device: torch.device) -> list[tuple[Names, Tensor | None]]:
        """Adapters, and the indices (int64) of their rows in a flattened shape (rows, tokens, …) or (rows · tokens,).

        None for the indices where all rows have the same adapters. Raises ModelError for any other shape, in which
        a row cannot be recognised.
        """
        groups = self.groups()
        if len(groups) == 1:
            return [(names, None) for names in groups]
        if shape not in self._places:
            rows = len(self.names)
            if len(shape) > 1 and shape[0] == rows:
                each = math.prod(shape[1:])
            elif shape == (rows * self.width,):
                each = self.width
            else:
                raise ModelError(
                    f"An adapted layer of this model is given {tuple(shape)} vectors of a batch of {rows} rows, "
                    f"so it cannot compute each row with its own adapter; generate with one adapter at a time."
                )
            first = {names: torch.tensor(members, device=device) * each for names, members in groups.items()}
            within = torch.arange(each, device=device)
            self._places[shape] = [(names, (start[:, None] + within).flatten()) for names, start in first.items()]
        return self._places[shape]
