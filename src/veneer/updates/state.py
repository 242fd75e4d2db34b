"""The state dict of an adapted model: all of its adapters' state, so that loops of others save and resume them.

`hooked` puts two hooks of PyTorch on the model. The one after ``state_dict()`` adds AdaLoRA's allocators, as tensors
named ``veneer.<adapter>.…``, and leaves out the parameters of matrices of rank 0: savers of files treat empty tensors
as one shared. The one before ``load_state_dict()`` takes both back: it gives every matrix the rank that it had in the
saved state, smaller or larger, before the values are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.device import CPU
from veneer.errors import AdapterFileError
from veneer.files import atomic_file
from veneer.updates.adapter_file import adapter_tensors, mismatches, write_tensors
from veneer.updates.layers import Adapted, Triplets
from veneer.updates.record import adapters_of

PREFIX = "veneer."
ADAPTER_ONLY = f"{PREFIX}adapter_only"  # says that a state has no base weights
RESUME_NAME = "model.safetensors"  # the file that transformers' Trainer gives to load_state_dict


def hooked(model: nn.Module) -> list[RemovableHandle]:
    """Both hooks, put on ``model``; they are to be removed with its last adapter."""
    return [
        model.register_state_dict_post_hook(_complete),  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(_take),  # type: ignore[no-untyped-call]
    ]


def write_resumable(model: nn.Module, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Beside an adapter's folder, what resumes its training: the active adapters' part of the model's state dict, or of
    ``state``, which is one."""
    trained = _trained(model)
    if state is not None:
        trained = {key: state.get(key, tensor) for key, tensor in trained.items()}
    tensors = {key: tensor.detach().to(CPU).contiguous() for key, tensor in trained.items()}
    with atomic_file(folder / RESUME_NAME) as path:
        write_tensors(tensors | {ADAPTER_ONLY: torch.ones(1)}, path)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Key in the model's state dict → the tensor, of the active adapters and their allocators."""
    active = adapters_of(model).active
    own = {id(tensor) for name in active for tensor in adapter_tensors(model, name).values()}
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        allocators = any(key.startswith(f"{PREFIX}{name}.") for name in active)
        if allocators or id(tensor) in own:
            own.discard(id(tensor))  # new rows that a tied head shares are written once
            tensors[key] = tensor
    return tensors


def _complete(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    record = adapters_of(module)
    if record.merged:  # it is a plain model now, and saved as one
        return
    for key in _empty(module):
        state.pop(f"{prefix}{key}", None)
    for name, allocator in record.allocators.items():
        state.update({f"{prefix}{PREFIX}{name}.{key}": tensor for key, tensor in allocator.state_dict().items()})


def _take(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    record = adapters_of(module)
    if record.merged:
        return
    alone = state.pop(f"{prefix}{ADAPTER_ONLY}", None) is not None
    saved = {name: _popped(state, f"{prefix}{PREFIX}{name}.") for name in record.allocators}
    for name, allocator in record.allocators.items():
        if saved[name]:
            allocator.refuse_other(saved[name])
    if alone:
        _refuse_other_adapter(module, {key.removeprefix(prefix): tensor for key, tensor in state.items()}, saved)
    for name, allocator in record.allocators.items():
        if saved[name]:
            allocator.load_state_dict(saved[name])
    for key, parameter in _empty(module).items():
        state.setdefault(f"{prefix}{key}", parameter)
    if alone:
        for key, tensor in module.state_dict(keep_vars=True).items():
            if not key.startswith(PREFIX):
                state.setdefault(f"{prefix}{key}", tensor)  # itself: copying it moves nothing


def _popped(state: dict[str, Any], start: str) -> dict[str, Tensor]:
    return {key.removeprefix(start): state.pop(key) for key in list(state) if key.startswith(start)}


def _refuse_other_adapter(module: nn.Module, state: dict[str, Tensor], saved: dict[str, dict[str, Tensor]]) -> None:
    """Raises AdapterFileError where the state of an adapter alone is not that of the active ones."""
    own = {key: tensor for key, tensor in _trained(module).items() if not key.startswith(PREFIX)}
    for name, allocator in adapters_of(module).allocators.items():
        left = saved[name]["kept"].bool() if saved[name] else allocator.kept
        for (path, update), row in zip(allocator.triplets.items(), left, strict=True):
            # Ranks are the allocator's to compare: here, all are 0, and matrices without a triplet are not in the file.
            for part, dim in (("P", 1), ("lam", 0), ("Q", 0)):
                key = f"{path}.updates.{name}.{part}"
                if key in own or not update.rank:
                    own[key] = getattr(update, part).narrow(dim, 0, 0)
                if key in state:
                    state[key] = state[key].narrow(dim, 0, 0)
                elif not row.any():
                    own.pop(key, None)
    problems = mismatches(state, own, set())
    if problems:
        raise AdapterFileError(
            f"The checkpoint holds another adapter than the one attached to this model: {'; '.join(problems)}. Attach "
            f"one of the same name and options as the run that is resumed."
        )


def _empty(module: nn.Module) -> dict[str, nn.Parameter]:
    """Key in the state dict → parameter, of the matrices that have no triplet left."""
    return {
        f"{path}.updates.{name}.{part}": parameter
        for path, adapted in module.named_modules(remove_duplicate=False)
        if isinstance(adapted, Adapted)
        for name, update in adapted.updates.items()
        if isinstance(update, Triplets) and not update.rank
        for part, parameter in update.named_parameters()
    }
