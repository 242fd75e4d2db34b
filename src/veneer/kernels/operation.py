"""An operation: its schema, its fake and its definition, registered once as the torch operator ``torch.ops.veneer.…``.

The definition, in plain PyTorch, serves every device for which no backend has registered a kernel; a kernel computes
the same. The fake gives shapes without values, so that torch.compile, export and plans see these and nothing inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from veneer.kernels.coded import SCHEMA, CodedWeight

P = ParamSpec("P")
R = TypeVar("R")
_WEIGHT = "{weight}"


class Kernel(NamedTuple):
    """What computes an operation on some device; ``run`` takes the operator's arguments."""

    name: str  # of the operator
    run: Callable[..., Any]


class Operation(Generic[P, R]):
    """Called, it dispatches to the kernel that serves its arguments' device."""

    def __init__(self, schema: str, definition: Callable[P, R], fake: Callable[P, R]) -> None:
        self.definition = definition
        self.name = f"veneer::{definition.__name__}"
        self.__doc__ = definition.__doc__
        torch.library.define(self.name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(self.name, "default", self._run(definition))
        torch.library.register_fake(self.name, self._run(fake))
        self.operator: Callable[..., R] = getattr(torch.ops.veneer, definition.__name__).default

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> R:
        return self.operator(*arguments, **named)

    def by(self, function: Callable[P, R]) -> Kernel:
        """The kernel that computes this operation by ``function``."""
        return Kernel(self.name, self._run(function))

    def _run(self, function: Callable[P, R]) -> Callable[..., R]:
        """``function`` of the operator's arguments."""
        return function


class _CodedOperation(Operation[P, R]):
    """One that takes a `CodedWeight`: an operator's schema has no such type, so its fields are the arguments."""

    def __init__(self, schema: str, definition: Callable[P, R], fake: Callable[P, R]) -> None:
        self._place = schema.partition(_WEIGHT)[0].count(",")
        super().__init__(schema.replace(_WEIGHT, SCHEMA), definition, fake)

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> R:
        place = self._place
        weight: Any = arguments[place]
        return self.operator(*arguments[:place], *weight, *arguments[place + 1 :], **named)

    def _run(self, function: Callable[..., R]) -> Callable[..., R]:
        first, last = self._place, self._place + len(CodedWeight._fields)

        def run(*arguments: Any) -> R:
            return function(*arguments[:first], CodedWeight(*arguments[first:last]), *arguments[last:])

        return run


def operation(schema: str, fake: Callable[P, R]) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make a definition an `Operation` of its name. ``{weight}`` in the ``schema`` is a `CodedWeight`."""
    kind = _CodedOperation if _WEIGHT in schema else Operation
    return lambda definition: kind(schema, definition, fake)
