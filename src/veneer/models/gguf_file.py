"""A GGUF file's tensors, one at a time, expanded to fp32 as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from veneer.errors import ModelError
from veneer.models.gguf_config import READ_BY_TRANSFORMERS
from veneer.models.gguf_header import GgufHeader
from veneer.models.gguf_keys import ROPE_TENSORS
from veneer.models.gguf_layout import TENSOR_BY_TENSOR, reading, tensor_names
from veneer.models.joined import NotTensorByTensor
from veneer.models.library import some_of


class GgufFile:
    """The `Tensors` of the GGUF file of ``header``.

    transformers says what each is called, and what llama.cpp's converter did to it.
    """

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self._names: dict[str, str] = {key: key for key in header.tensors}  # the file's, by the tensor's name
        self._process = reading(header.architecture)

    def names(self) -> set[str]:
        return set(self._names)

    def rename(self, model: Any) -> None:
        """Raises NotTensorByTensor for an architecture whose tensors are not the model's own one by one, ModelError for
        tensors that the model has no place for."""
        architecture = self._header.architecture
        if self._process not in TENSOR_BY_TENSOR or architecture in READ_BY_TRANSFORMERS:
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
        keys = tensor_names(model, self._header.architecture, self._processor)
        head = () if model.get_output_embeddings() is not None else ("output.weight", "output.bias")
        experts = {f"{key}.weight" for key in keys if key.endswith("_exps")}  # which the model has without "weight"
        others = sorted(set(self._header.tensors) - set(keys) - experts - set(ROPE_TENSORS) - set(head))
        if others:
            raise ModelError(
                f"{self._header.name} holds {some_of(others)}, which its model ({type(model).__name__}) has no place "
                f"for; load the model that the file was made of."
            )
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
