"""A checkpoint's tensors by the names that the model has for them, one at a time: a safetensors folder, a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors import safe_open
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as gguf_models
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings


class Tensors(Protocol):
    """What a checkpoint holds. Names are the file's until `rename`."""

    def names(self) -> set[str]:
        """Of all tensors that the model has a name for, or that it may refuse."""
        ...

    def rename(self, model: Any) -> None:
        """Call the tensors as the model does, where its checkpoints have other names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own or mapped: when it goes, no page of the file is left in the process."""
        ...


def tensors_of(path: Path) -> Tensors:
    """Of a model's folder, or GGUF file. Raises whatever a damaged file makes its reader raise."""
    return GgufFile(path) if path.is_file() else SafetensorsFolder(path)


class SafetensorsFolder:
    """The safetensors files of a folder: which holds what, and its tensors, copied or mapped."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        self._where: dict[str, Path] = {}
        if index.is_file():
            keys = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._where = {key: folder / file for key, file in keys.items()}
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", "pt") as file:
                self._where = dict.fromkeys(file.keys(), folder / "model.safetensors")
        self._open: dict[Path, Any] = {}
        self._names: dict[str, str] = {key: key for key in self._where}

    def names(self) -> set[str]:
        return set(self._where)

    def rename(self, model: Any) -> None:
        renamings = [c for c in get_model_conversion_mapping(model, add_legacy=False) if isinstance(c, WeightRenaming)]
        self._names = {apply_renamings(key, renamings): key for key in self._where}
        self._where = {name: self._where[key] for name, key in self._names.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(self._names[name]).get_shape())

    def mapped(self, name: str) -> Tensor:
        """The tensor in the mapped file; all of a file are parts of one mapping, which lives as long as they do."""
        tensor: Tensor = self._file(name).get_tensor(self._names[name])
        return tensor

    def read(self, name: str) -> Tensor:
        with safe_open(self._where[name], "pt") as file:
            tensor: Tensor = file.get_tensor(self._names[name])
        return tensor

    def _file(self, name: str) -> Any:
        path = self._where[name]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt").__enter__()  # type: ignore[no-untyped-call]
        return self._open[path]


# What these do to a tensor needs that tensor only. The others split, join or reshape.
_TENSOR_BY_TENSOR = (
    gguf_models.TensorProcessor,
    gguf_models.LlamaTensorProcessor,  # the order of a head's rows, in queries and keys
    gguf_models.Gemma2TensorProcessor,  # norms of 1 + w
    gguf_models.NemotronTensorProcessor,
)


class _Held(NamedTuple):
    """Where a tensor lies in a GGUF file."""

    name: str
    type: Any
    shape: tuple[int, ...]
    offset: int  # bytes
    size: int  # bytes


class GgufFile:
    """A GGUF file, whose quantised tensors are expanded to fp32 as they are read.

    transformers says what each is called, and what llama.cpp's converter did to it. Raises ValueError for an
    architecture whose tensors are not the model's own one by one, and for a file of the other byte order.
    """

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self._path = path
        # Without the reader's own tensors, which would keep the file mapped.
        self._held = {
            t.name: _Held(t.name, t.tensor_type, tuple(map(int, reversed(t.shape))), int(t.data_offset), int(t.n_bytes))
            for t in reader.tensors
        }
        self._names: dict[str, str] = {name: name for name in self._held}
        (architecture,) = gguf_models.read_field(reader, "general.architecture")
        self._process = gguf_models.TENSOR_PROCESSORS.get(architecture, gguf_models.TensorProcessor)
        if self._process not in _TENSOR_BY_TENSOR or reader.byte_order == "S":
            raise ValueError(f"{path} cannot be read a tensor at a time")

    def names(self) -> set[str]:
        return set(self._names)

    def rename(self, model: Any) -> None:
        self._processor = self._process(config=model.config.to_dict())
        found = gguf_models.get_gguf_hf_weights_map(model, self._processor)
        self._names = {name: held for held, name in found.items() if held in self._held}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._held[self._names[name]].shape

    def read(self, name: str) -> Tensor:
        held = self._held[self._names[name]]
        with self._path.open("rb") as file:
            packed = np.fromfile(file, np.uint8, held.size, offset=held.offset)
        values = dequantize(packed.reshape(*held.shape[:-1], -1), held.type)
        del packed
        own = self._processor.process(weights=values, name=held.name, tensor_key_mapping={}, parsed_parameters={})
        return torch.from_numpy(np.ascontiguousarray(own.weights))
