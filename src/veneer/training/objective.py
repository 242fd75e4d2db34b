"""What a run makes better: the likelihood of its answers, or a preference between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from veneer.data.labels import Tokens
from veneer.training.loss import How, Measured


class Objective(Protocol):
    """A loss as the loop sees it."""

    @property
    def kind(self) -> str: ...
    @property
    def how(self) -> How: ...

    def attention(self) -> AbstractContextManager[None]:
        """To be entered around loss and backward pass, as `Loss.attention`."""
        ...

    def of_step(self, parts: list[list[Tokens]]) -> Callable[[list[Tokens]], Tensor]:
        """For the parts of a step, what gives each part's share of the step's loss, differentiable ()."""
        ...

    def held_out(self, rows: Sequence[Tokens], batch_size: int) -> Measured:
        """What is measured of held-out rows, the model in eval mode meanwhile."""
        ...
