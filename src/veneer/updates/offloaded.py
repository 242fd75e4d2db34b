"""What accelerate put on modules: tensors that are in memory only during a call, and forward passes of its own."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.hooks import add_hook_to_module
from torch import nn

from veneer.errors import ModelError, TargetError
from veneer.frozen.called import has_other_forward, is_offloaded

_FORWARD = ("forward", "_old_forward", "_hf_hook")  # what accelerate sets on a module


def refuse_offloaded(model: nn.Module, modules: Sequence[nn.Module], action: str) -> None:
    """Raises ModelError where the values of one of these modules of ``model`` are not in memory."""
    away = {id(module) for module in modules if is_offloaded(module)}
    names = [name for name, module in model.named_modules() if id(module) in away]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(
            f"{names[0]}{more} cannot {action}: accelerate offloads it, so its values are not in memory; load the "
            f"model without device_map for that."
        )


def refuse_other_forward(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Raises TargetError where the forward of a base was replaced: it is the old module's, with the old weight."""
    inside = {id(getattr(module, "base", module)) for module in modules}
    for name, module in model.named_modules():
        if id(module) in inside and has_other_forward(module) and not hasattr(module, "_hf_hook"):
            path = name.removesuffix(".base")
            raise TargetError(
                f"{path} cannot be merged: its forward was replaced on the module itself, and goes on with the weight "
                f"before the merge; delete that attribute first."
            )


def hooked_as(base: nn.Module, module: nn.Module) -> nn.Module:
    """``module``, a shallow copy of ``base``, with accelerate's hook on its own forward and not on the base's."""
    hook = base.__dict__.get("_hf_hook")
    if hook is not None:
        for name in _FORWARD:
            module.__dict__.pop(name, None)
        add_hook_to_module(module, hook)
    return module
