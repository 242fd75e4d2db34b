"""Which layers of a model are kept in codes, and how those of a loaded model are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.frozen.weight import QuantisedLinear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = ("classifier", "score", "classification_head")  # of sequence-classification models


def quantise_linear_layers(model: nn.Module, **how: Any) -> None:
    """Keep every layer that `linear_layers` names in codes, in place, one after another; ``how``: as `quantise`."""
    for name in linear_layers(model):
        made = QuantisedLinear.of(model.get_submodule(name), f"{name}.weight", **how)
        model.set_submodule(name, made)


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the layers that a quantised storage keeps in codes: the linear ones but the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not head and name.split(".")[0] not in HEADS
    ]


def storage_of(model: nn.Module) -> dict[str, Any]:
    """How the weights of a loaded model are kept: the options of `load` that keep them so."""
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            double = module.nested_scales is not None
            return {"storage": module.storage, "block_size": module.block_size, "double_quantisation": double}
    dtype = next(model.parameters()).dtype
    return {"storage": next((name for name, known in DTYPES.items() if known is dtype), "fp32")}
