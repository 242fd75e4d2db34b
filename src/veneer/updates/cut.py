"""Take triplets out of the parameters and of the optimizer's states, where they stand, while training goes on; and give
them places again, when an earlier state is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import TrainingError
from veneer.updates.layers import Triplets


def cut(update: Triplets, kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Keep the triplets of ``update`` that ``kept`` (rank,) is true for, in its parameters, gradients and states.

    The parameters remain the same objects, so an optimizer, or a list of parameters that somebody holds, goes on as it
    was. ``optimizer``: the one whose states follow; None when none has been made.
    """
    index = kept.to(update.lam.device).nonzero().flatten()

    def select(tensor: Tensor, dim: int) -> Tensor:
        return tensor.index_select(dim, index.to(tensor.device)).contiguous()

    _reshape(update, select, optimizer)
    update.kept[update.kept.nonzero().flatten()[~kept.to(update.kept.device)]] = False


def grow(update: Triplets, optimizer: torch.optim.Optimizer | None) -> None:
    """Give ``update`` all triplets again that it began with, in its parameters and states: zeros, to be loaded.

    Raises TrainingError for an optimizer that keeps its states in pages, which become smaller only.
    """
    if hasattr(optimizer, "reshaping"):
        raise TrainingError(
            f"A {type(optimizer).__name__} cannot go back to a state from before AdaLoRA's ranks were fixed; load it "
            f"into a model that was attached for it, with an optimizer of its own."
        )
    rank = len(update.kept)

    def zeros(tensor: Tensor, dim: int) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = rank
        return tensor.new_zeros(shape)

    _reshape(update, zeros, optimizer)
    update.kept.fill_(True)


def _reshape(update: Triplets, change: Callable[..., Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    for parameter, dim in ((update.P, 1), (update.lam, 0), (update.Q, 0)):
        _reshape_parameter(parameter, dim, partial(change, dim=dim), optimizer)


@torch.no_grad()
def _reshape_parameter(
    parameter: nn.Parameter, dim: int, change: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer | None
) -> None:
    with _states_following(optimizer, parameter, dim, change):
        other_size = change(parameter.detach())
        gradient = None if parameter.grad is None or not other_size.numel() else change(parameter.grad)
        parameter.grad = None
        # A loss that the caller still holds keeps the node alive that adds up this parameter's gradient, and with it
        # the old shape. Only a change of type makes autograd forget it.
        other = torch.float16 if other_size.dtype != torch.float16 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=other_size.device)
        parameter.data = other_size
        parameter.grad = gradient


def _states_following(
    optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, dim: int, select: Callable[[Tensor], Tensor]
) -> AbstractContextManager[None]:
    """Inside, the parameter gets another size; when it ends, the optimizer's states of it have it, too."""
    if optimizer is None:
        return nullcontext()
    elsewhere = getattr(optimizer, "reshaping", None)  # PagedAdamW's states are not in ``optimizer.state``
    if elsewhere is not None:
        return elsewhere(parameter, select)  # type: ignore[no-any-return]
    return _in_memory(optimizer, parameter, dim, select)


@contextmanager
def _in_memory(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, dim: int, select: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    state = optimizer.state.get(parameter)
    smaller = _smaller(state, parameter.shape, dim, select) if state else {}
    yield
    if smaller:
        optimizer.state[parameter] = smaller
    elif state:
        del optimizer.state[parameter]
        warnings.warn(
            f"{type(optimizer).__name__} keeps its states in a form that cannot be cut with their parameters; those of "
            f"the smaller ones start from zero.",
            stacklevel=2,
        )


def _smaller(
    state: Mapping[str, Any], shape: torch.Size, dim: int, select: Callable[[Tensor], Tensor]
) -> dict[str, Any] | None:
    """The states in their new shapes; None when one is neither a number nor laid out as its parameter (or, like
    Adafactor's, with some of its dimensions reduced to 1)."""
    states: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            states[name] = value
        elif value.dim() == len(shape) and all(a in (b, 1) for a, b in zip(value.shape, shape, strict=True)):
            states[name] = select(value) if value.shape[dim] == shape[dim] else value
        else:
            return None
    return states
