"""The tensors that a merge would leave, one at a time: the model stays as it is, and no second one is made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from veneer.updates.inner import inner_model
from veneer.updates.merge import merged_module, outermost
from veneer.updates.record import adapters_of, refuse_merged


def merged_tensors(model: nn.Module) -> Callable[[str], Tensor]:
    """A function from the name of a tensor in the plain model's state dict to the tensor with the active updates folded
    in, which it computes when it is called.

    Raises TargetError where the updates are merged already; the function raises AdapterFileError where a sum is not
    finite.

    Example:
        >>> read = merged_tensors(model)
        >>> read("lm_head.weight").shape
        torch.Size([263, 32])
    """
    model = inner_model(model)
    refuse_merged(adapters_of(model), "write it merged")
    wrappers: dict[str, nn.Module] = dict(outermost(model))
    shared: dict[int, nn.Parameter] = {}

    @torch.no_grad()
    def read(name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        inside: list[str] = []
        while path and path not in wrappers:
            path, _, part = path.rpartition(".")
            inside.insert(0, part)
        module = merged_module(path, wrappers[path], shared) if path else model
        value: Tensor = getattr(module.get_submodule(".".join(inside)), last)
        return value.detach()

    return read
