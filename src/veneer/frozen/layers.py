"""Which layers of a model are kept in codes, and how those of a loaded model are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.frozen.new_parts import new_parts, task_parts
from veneer.frozen.read_outside import read_outside
from veneer.frozen.text_part import HEADS as HEADS
from veneer.frozen.text_part import beside_text
from veneer.frozen.weight import PLAIN_TYPES, STORED, QuantisedLinear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quantise_linear_layers(model: nn.Module, **how: Any) -> None:
    """Keep every layer that `linear_layers` names in codes, in place, one after another; ``how``: as `quantise`."""
    for name in linear_layers(model):
        made = QuantisedLinear.of(model.get_submodule(name), f"{name}.weight", **how)
        model.set_submodule(name, made)


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the layers that a quantised storage keeps in codes: the linear ones of the text part but its output
    head, what is new for its task, and those whose weight the model reads itself (`read_outside`)."""
    outside = read_outside(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = dict(model.named_modules())
    new = [*HEADS, *task_parts(model), *new_parts(model, modules)[0]]
    others = tuple(f"{name}." for name in [*beside_text(model), *new])
    return [
        name
        for name, module in modules.items()
        if type(module) in PLAIN_TYPES
        and module is not head
        and not f"{name}.".startswith(others)
        and name not in outside
    ]


def dense_linear_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers that no storage keeps in codes, since the model reads their weight itself."""
    outside = read_outside(model)
    return [name for name, module in model.named_modules() if name in outside and type(module) in PLAIN_TYPES]


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Multiply in ``dtype``, in place, by weights that stay in the type they are kept in.

    Matrices of linear layers and embeddings stay; all else, which is small, is converted: norms, biases, a new
    classification head, what the model's class says must not be in 16 bits, and weights that it reads itself.
    """
    apart = {*HEADS, *(getattr(model, "_keep_in_fp32_modules", None) or ())}
    outside = read_outside(model)
    stay = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(partial(_given_in, dtype))
            stay.add(id(module.weight))
        elif type(module) in STORED and name not in outside and not apart & set(name.split(".")):
            module.__class__ = STORED[type(module)]  # in place: what else holds the module, holds it still
            stay.add(id(module.weight))
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in stay:
            parameter.data = parameter.data.to(dtype)


def _given_in(dtype: torch.dtype, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def storage_of(model: nn.Module) -> dict[str, Any]:
    """How the weights of a loaded model are kept: the options of `load` that keep them so."""
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            double = module.nested_scales is not None
            return {"storage": module.storage, "block_size": module.block_size, "double_quantisation": double}
    dtype = next(model.parameters()).dtype
    return {"storage": next((name for name, known in DTYPES.items() if known is dtype), "fp32")}
