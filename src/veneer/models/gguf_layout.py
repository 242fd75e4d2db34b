"""What a GGUF file calls a model's tensors, and how llama.cpp's converter stores each: read, and written the other way
round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as gguf_models

from veneer.models.joined import NotTensorByTensor

Array = np.ndarray[Any, np.dtype[Any]]


class _Falcon(gguf_models.TensorProcessor):  # type: ignore[misc]
    """llama.cpp's converter puts all queries first, then all keys, then all values; the model has them by groups."""

    def process(self, weights: Any, name: str, **_: Any) -> Any:
        if ".attn_qkv." in name:
            heads, groups = self.config["num_attention_heads"], self.config["num_kv_heads"]
            size = weights.shape[0] // (heads + 2 * groups)
            q, k, v = np.split(weights, [heads * size, (heads + groups) * size])
            parts = (part.reshape(groups, -1, *weights.shape[1:]) for part in (q, k, v))
            weights = np.concatenate([*parts], axis=1).reshape(weights.shape)
        return gguf_models.GGUFTensor(weights, name, {})


# Architectures for which transformers has no processor.
_OURS = {
    "falcon": _Falcon,
    "smollm3": gguf_models.LlamaTensorProcessor,
    "granite": gguf_models.LlamaTensorProcessor,
}
# What these do to a tensor needs that tensor only. The others split, join or reshape.
TENSOR_BY_TENSOR = (
    gguf_models.TensorProcessor,
    gguf_models.LlamaTensorProcessor,  # the order of a head's rows, in queries and keys
    gguf_models.Gemma2TensorProcessor,  # norms of 1 + w
    gguf_models.NemotronTensorProcessor,
    _Falcon,
)


def reading(architecture: str) -> Any:
    """The processor, of transformers or ours, of an architecture's tensors as they are read."""
    return _OURS.get(architecture) or gguf_models.TENSOR_PROCESSORS.get(architecture, gguf_models.TensorProcessor)


def tensor_names(model: Any, architecture: str, processor: Any) -> dict[str, str]:
    """The model's names by the file's. Raises NotTensorByTensor for an architecture that gguf has no names for.

    As transformers' own function does it, which looks into each module of the model and so takes half a minute for 62
    layers.
    """
    name_of = namer(model.config, architecture, model.base_model_prefix)
    keys: dict[str, str] = {}
    for key in model.state_dict():
        name, suffix = key, ""
        if key.endswith((".weight", ".bias")):
            name, _, ending = key.rpartition(".")
            suffix = f".{ending}"
        own = name_of(name)
        if own is None:
            processor.perform_fallback_tensor_mapping(keys, suffix, "", key)
        else:
            keys[own + suffix] = key
    return keys


def namer(config: Any, architecture: str, prefix: str) -> Callable[[str], str | None]:
    """A module's name in a model of ``config`` → the file's, or None. ``prefix``: the body's name in the model.

    Raises NotTensorByTensor for an architecture that gguf has no names for.
    """
    architectures = [kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture]
    if not architectures:
        raise NotTensorByTensor(f"gguf has no names for the tensors of a {config.model_type}")
    layers = max(config.num_hidden_layers, getattr(config, "num_decoder_layers", None) or 0)
    names = get_tensor_name_map(architectures[0], layers)
    return lambda module: names.get_name(module) or names.get_name(module.removeprefix(f"{prefix}."))


def as_written(architecture: str, name: str, values: Tensor, config: Any) -> Tensor:
    """A tensor of a model of ``config`` as the file ``name``s and stores it; rows are its first dimension. The inverse
    of what the processor of `reading` does."""
    written = _WRITTEN.get(architecture)
    return values if written is None else written(name, values, config)


def rows_as_written(architecture: str, name: str, rows: Array, config: Any) -> Array:
    """The rows of a matrix that is multiplied into others before it is used, an update's B, in the file's order."""
    if _WRITTEN.get(architecture) is not _neighbours:
        return rows
    made: Array = _neighbours(name, torch.from_numpy(rows), config).numpy()
    return made


def _neighbours(name: str, values: Tensor, config: Any) -> Tensor:
    """llama.cpp rotates neighbours where transformers rotates halves of a head."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return values
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _one_more(name: str, values: Tensor, config: Any) -> Tensor:
    """Gemma's norms multiply by 1 + w."""
    return values.float() + 1 if name.endswith("norm.weight") else values


def _turned(name: str, values: Tensor, config: Any) -> Tensor:
    """GPT-2's layers keep (in, out)."""
    turned = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return values.T if name.endswith(turned) else values


_WRITTEN: dict[str, Callable[[str, Tensor, Any], Tensor]] = {
    "llama": _neighbours,
    "smollm3": _neighbours,
    "granite": _neighbours,
    "gemma2": _one_more,
    "gemma3": _one_more,
    "gpt2": _turned,
}
