"""torch's encoder layers, which in eval mode read their linear layers' weights instead of calling these."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.updates.layers import Adapted

_WAS_NESTED = "_veneer_used_nested_tensor"


def call_every_layer(model: nn.Module) -> None:
    """Switch the fast path off in each nn.TransformerEncoder and layer of it that holds an update; on again, where it
    was on, in the others."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in module.children():
                if isinstance(child, Adapted) and not child._forward_hooks:
                    child.register_forward_hook(_nothing)  # a layer with hooks in it calls what it holds
        elif isinstance(module, nn.TransformerEncoder):
            updated = any(isinstance(inner, Adapted) for inner in module.modules())
            if updated and _WAS_NESTED not in module.__dict__:
                module.__dict__[_WAS_NESTED] = getattr(module, "use_nested_tensor", False)
                module.use_nested_tensor = False
            elif not updated and _WAS_NESTED in module.__dict__:
                module.use_nested_tensor = module.__dict__.pop(_WAS_NESTED)


def _nothing(module: nn.Module, arguments: Any, output: Any) -> None:
    return None
