"""A GGUF file's tensors, one at a time, expanded to fp32 as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as gguf_models
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from veneer.errors import ModelError
from veneer.models.gguf_config import READ_BY_TRANSFORMERS
from veneer.models.gguf_header import GgufHeader
from veneer.models.gguf_keys import ROPE_TENSORS
from veneer.models.joined import NotTensorByTensor
from veneer.models.library import some_of


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


_OURS = {"falcon": _Falcon}
# What these do to a tensor needs that tensor only. The others split, join or reshape.
_TENSOR_BY_TENSOR = (
    gguf_models.TensorProcessor,
    gguf_models.LlamaTensorProcessor,  # the order of a head's rows, in queries and keys
    gguf_models.Gemma2TensorProcessor,  # norms of 1 + w
    gguf_models.NemotronTensorProcessor,
    _Falcon,
)


class GgufFile:
    """The `Tensors` of the GGUF file of ``header``.

    transformers says what each is called, and what llama.cpp's converter did to it.
    """

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self._names: dict[str, str] = {key: key for key in header.tensors}  # the file's, by the tensor's name
        ours = _OURS.get(header.architecture)
        self._process = ours or gguf_models.TENSOR_PROCESSORS.get(header.architecture, gguf_models.TensorProcessor)

    def names(self) -> set[str]:
        return set(self._names)

    def rename(self, model: Any) -> None:
        """Raises NotTensorByTensor for an architecture whose tensors are not the model's own one by one, ModelError for
        tensors that the model has no place for."""
        architecture = self._header.architecture
        if self._process not in _TENSOR_BY_TENSOR or architecture in READ_BY_TRANSFORMERS:
            raise NotTensorByTensor(
                f"a GGUF file of {architecture} has tensors that are split or joined as they are read"
            )
        if any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(model, add_legacy=False)):
            raise NotTensorByTensor("its tensors are joined or turned as they are read")
        keys = self._map(model)
        self._names = {name: key for key, name in keys.items() if key in self._header.tensors}

    def whole(self, model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors by ``model``'s names, in ``dtype``, those that the file has in other pieces put together.

        Raises ModelError for tensors that the model has no place for, and for a file that cannot be read.
        """
        try:
            keys = self._map(model)
        except NotTensorByTensor as reason:
            raise ModelError(f"{self._header.name} cannot be read as a model: {reason}.") from None
        made: dict[str, Tensor] = {}
        for stored in self._header.tensors:
            own = self._processor.process(
                weights=self._header.expand(stored), name=stored, tensor_key_mapping=keys,
                parsed_parameters={"tensors": made},
            )  # fmt: skip
            if own.name in keys:
                made[keys[own.name]] = torch.from_numpy(np.ascontiguousarray(own.weights)).to(dtype)
        return {name: tensor.to(dtype) for name, tensor in made.items()}

    def _map(self, model: Any) -> dict[str, str]:
        """The model's names by the file's."""
        if self._header.swapped:
            raise NotTensorByTensor("it is a GGUF file of the other byte order")
        self._processor = self._process(config=model.config.to_dict())
        keys = self._named(model)
        head = () if model.get_output_embeddings() is not None else ("output.weight", "output.bias")
        experts = {f"{key}.weight" for key in keys if key.endswith("_exps")}  # which the model has without "weight"
        others = sorted(set(self._header.tensors) - set(keys) - experts - set(ROPE_TENSORS) - set(head))
        if others:
            raise ModelError(
                f"{self._header.name} holds {some_of(others)}, which its model ({type(model).__name__}) has no place "
                f"for; load the model that the file was made of."
            )
        return keys

    def _named(self, model: Any) -> dict[str, str]:
        """As transformers' own function does it, which looks into each module of the model and so takes half a minute
        for 62 layers."""
        architectures = [kind for kind, name in MODEL_ARCH_NAMES.items() if name == self._header.architecture]
        if not architectures:
            raise NotTensorByTensor(f"gguf has no names for the tensors of a {model.config.model_type}")
        layers = max(model.config.num_hidden_layers, getattr(model.config, "num_decoder_layers", None) or 0)
        names = get_tensor_name_map(architectures[0], layers)
        keys: dict[str, str] = {}
        for key in model.state_dict():
            name, suffix = key, ""
            if key.endswith((".weight", ".bias")):
                name, _, ending = key.rpartition(".")
                suffix = f".{ending}"
            own = names.get_name(name) or names.get_name(name.removeprefix(f"{model.base_model_prefix}."))
            if own is None:
                self._processor.perform_fallback_tensor_mapping(keys, suffix, "", key)
            else:
                keys[own + suffix] = key
        return keys

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header.tensors[self._names[name]].shape

    def read(self, name: str) -> Tensor:
        stored = self._names[name]
        values = self._header.expand(stored)
        own = self._processor.process(weights=values, name=stored, tensor_key_mapping={}, parsed_parameters={})
        return torch.from_numpy(np.ascontiguousarray(own.weights))

    def matrices(self, name: str) -> Iterator[Tensor]:
        yield from self.read(name)
