"""A GGUF file's tensors, one at a time, expanded to fp32 as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as gguf_models
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from veneer.models.joined import NotTensorByTensor
from veneer.models.library import call_library, no_model, unreadable

# What these do to a tensor needs that tensor only. The others split, join or reshape.
_TENSOR_BY_TENSOR = (
    gguf_models.TensorProcessor,
    gguf_models.LlamaTensorProcessor,  # the order of a head's rows, in queries and keys
    gguf_models.Gemma2TensorProcessor,  # norms of 1 + w
    gguf_models.NemotronTensorProcessor,
)


class _Stored(NamedTuple):
    """Where a tensor is in a GGUF file."""

    name: str
    type: Any
    shape: tuple[int, ...]
    offset: int  # bytes
    size: int  # bytes


class GgufFile:
    """The `Tensors` of a GGUF file, of the model ``name``.

    transformers says what each is called, and what llama.cpp's converter did to it. Raises NotTensorByTensor for an
    architecture whose tensors are not the model's own one by one, and for a file of the other byte order; ModelError
    for a damaged file.
    """

    def __init__(self, path: Path, name: str) -> None:
        reader = call_library(GGUFReader, no_model(name), path)
        self._path, self._model = path, name
        # Without the reader's own tensors, which would keep the file mapped.
        self._stored = {
            t.name: _Stored(
                t.name, t.tensor_type, tuple(map(int, reversed(t.shape))), int(t.data_offset), int(t.n_bytes)
            )
            for t in reader.tensors
        }
        self._names: dict[str, str] = {key: key for key in self._stored}  # the file's, by the tensor's name
        architecture = "".join(gguf_models.read_field(reader, "general.architecture"))
        self._process = gguf_models.TENSOR_PROCESSORS.get(architecture, gguf_models.TensorProcessor)
        if self._process not in _TENSOR_BY_TENSOR:
            raise NotTensorByTensor(
                f"a GGUF file of {architecture} has tensors that are split or joined as they are read"
            )
        if reader.byte_order == "S":
            raise NotTensorByTensor("it is a GGUF file of the other byte order")

    def names(self) -> set[str]:
        return set(self._names)

    def rename(self, model: Any) -> None:
        if any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(model, add_legacy=False)):
            raise NotTensorByTensor("its tensors are joined or turned as they are read")
        self._processor = self._process(config=model.config.to_dict())
        try:
            keys = gguf_models.get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError:
            raise NotTensorByTensor(f"gguf has no names for the tensors of a {model.config.model_type}") from None
        self._names = {name: key for key, name in keys.items() if key in self._stored}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[self._names[name]].shape

    def read(self, name: str) -> Tensor:
        stored = self._stored[self._names[name]]
        with self._path.open("rb") as file:
            packed = np.fromfile(file, np.uint8, stored.size, offset=stored.offset)
        try:
            values = dequantize(packed.reshape(*stored.shape[:-1], -1), stored.type)
        except NotImplementedError as error:  # a type that gguf knows by its name alone
            raise unreadable(self._model, error) from error
        del packed
        own = self._processor.process(weights=values, name=stored.name, tensor_key_mapping={}, parsed_parameters={})
        return torch.from_numpy(np.ascontiguousarray(own.weights))

    def matrices(self, name: str) -> Iterator[Tensor]:
        yield from self.read(name)
