"""Whether a base module has to be called, or its product may be taken straight from its weight.

What hangs on a module's call would be passed by: hooks, accelerate's offloading, a forward that somebody replaced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.device import META
from veneer.frozen.weight import PLAIN_TYPES, QuantisedLinear

_KNOWN = frozenset((*PLAIN_TYPES, QuantisedLinear))


class SameForward(partial[Tensor]):
    """A forward pass put in the place of a module's own that computes the same, so that nothing hangs on its call."""


def only_multiplies(module: nn.Module, x: Tensor) -> bool:
    """Whether calling ``module`` on x does nothing but x W0ᵀ + b: its type is known, its forward and its weight are its
    own, and it has no hooks."""
    own = module.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    if hooked or type(module) not in _KNOWN or has_other_forward(module):
        return False
    weight = module._parameters.get("weight")
    return weight is None or not weight.is_meta or x.is_meta


def has_other_forward(module: nn.Module) -> bool:
    """Whether somebody, such as accelerate, has put another forward pass on this very module."""
    forward = module.__dict__.get("forward")
    return forward is not None and not isinstance(forward, SameForward)


def is_offloaded(module: nn.Module) -> bool:
    """Whether ``module``, or one in it, has tensors that accelerate brings into memory only while it is called."""
    return any(hook is not None and hook.offload for hook in map(_alignment, module.modules()))


def place_of_update(module: nn.Module) -> torch.device:
    """The device on which a module computes: that of its weight, or where accelerate brings an offloaded one."""
    device: torch.device = module.weight.device  # type: ignore[assignment]
    hook = _alignment(module)
    if device.type != META or hook is None or hook.execution_device is None:
        return device
    return torch.device(hook.execution_device)


def _alignment(module: nn.Module) -> Any:
    """accelerate's hook that moves a module's tensors, or None."""
    hook = module.__dict__.get("_hf_hook")
    hooks = [hook, *getattr(hook, "hooks", ())]  # one after another, in a SequentialHook
    return next((each for each in hooks if hasattr(each, "offload")), None)
