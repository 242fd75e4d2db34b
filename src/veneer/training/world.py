"""The processes that train one run together, as the loop sees them.

The loop asks nothing else about them: which micro-batches are its own, the sum over all processes, who writes files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

_Part = TypeVar("_Part")


class World(Protocol):
    """``rank`` of ``size`` processes, each with its own copy of what is trained."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files; one does."""
        ...

    def mine(self, parts: Sequence[_Part]) -> Sequence[_Part]:
        """This process's micro-batches of a step."""
        ...

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes; every process ends with the same bits."""
        ...


class OneProcess:
    """The world of a run in one process: all micro-batches are its own, and every sum is complete."""

    rank = 0
    size = 1
    writes = True

    def mine(self, parts: Sequence[_Part]) -> Sequence[_Part]:
        return parts

    def sum(self, tensors: Sequence[Tensor]) -> None:
        pass
