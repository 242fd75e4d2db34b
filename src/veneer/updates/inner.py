"""The model inside the wrappers that torch puts around one: torch.compile's, DataParallel, DistributedDataParallel."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper holds, or None for any other module."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        return cast(nn.Module, model.module)
    compiled = type(model).__name__ == "OptimizedModule"  # whose module is slow to import
    return model._modules.get("_orig_mod") if compiled else None


def inner_model(model: nn.Module) -> nn.Module:
    """The model itself: adapters are attached to it, and kept on it, whichever wrapper a function is given."""
    while (inner := inside(model)) is not None:
        model = inner
    return model
