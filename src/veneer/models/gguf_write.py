"""A model → a GGUF file, one tensor at a time and a few of its rows at a time: beside what the tensors come from, no
more is in memory than one tensor that has to be computed.

What the file says is read again before it has its name, by the code that reads any other: a file that is another model
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from torch import Tensor

from veneer.device import META
from veneer.errors import ModelError
from veneer.files import atomic_file
from veneer.models.gguf_config import gguf_config
from veneer.models.gguf_description import describe
from veneer.models.gguf_equal import refuse_other_model
from veneer.models.gguf_header import GgufHeader
from veneer.models.gguf_layout import as_written, reading, tensor_names
from veneer.models.gguf_tokenizer import Said, TokenizerKeys
from veneer.models.gguf_types import TYPES, kept_in_fp16, packed, size_of, type_of
from veneer.models.library import some_of
from veneer.models.stream import unfilled_model

_HEAD, _EMBEDDING = "lm_head.weight", "token_embd.weight"


@dataclass(frozen=True)
class GgufModel:
    """What is written. ``read``: a tensor by the name that it has in the plain model, when it is asked for;
    ``tokenizer``: the keys of its tokenizer; ``general``: more keys, whole names."""

    name: str
    config: Any
    read: Callable[[str], Tensor]
    tokenizer: TokenizerKeys
    general: Mapping[str, Any]


class Draft:
    """The GGUF file of a ``model``, matrices kept as ``storage`` (of `TYPES`), before it is written.

    Raises ModelError for an architecture, a config or a tensor that a GGUF file cannot hold.
    """

    def __init__(self, model: GgufModel, storage: str) -> None:
        self.model, self.storage = model, storage
        self._described = describe(model.config, model.name)
        self._plain = unfilled_model("causal", self._described.config, torch.float32, model.name)
        self._process = reading(self._described.architecture)(config=self._described.config.to_dict())
        self.names = self._named()
        own = self._plain.state_dict()
        empty = {name: torch.empty(own[key].shape, device=META) for name, key in self.names.items()}
        shapes = {name: tuple(self._as_written(name, values).shape) for name, values in empty.items()}
        self._shapes = shapes | {name: values.shape for name, values in self._described.tensors.items()}

    @property
    def notes(self) -> list[str]:
        """What a person may want to know of the file, as sentences."""
        wide = kept_in_fp16(self._shapes, self.storage)
        ours = [f"{some_of(wide)}: rows are no multiple of 32 values, so fp16 keeps them."] if wide else []
        return [*self._described.notes, *self.model.tokenizer.notes, *ours]

    def type_of(self, name: str) -> GGMLQuantizationType:
        """The type in which the file keeps its tensor ``name``."""
        return type_of(name, self._shapes[name], self.storage)

    @property
    def places(self) -> dict[str, str]:
        """The file's names of its tensors by the plain model's; a head that is the embedding has its."""
        return {_HEAD: _EMBEDDING} | {key: name for name, key in self.names.items()}

    def read_again(self, header: GgufHeader, key: str) -> Tensor:
        """The value that the model read from a file of this draft, written or rounded further, has for its tensor."""
        name = self.places[key]
        own = self._process.process(
            weights=header.expand(name), name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
        )
        return torch.from_numpy(np.ascontiguousarray(own.weights))

    def write(self, path: Path) -> None:
        """Write the file. Raises ModelError where it would be read as another model; then there is none."""
        with atomic_file(path) as temporary:
            writer = gguf.GGUFWriter(temporary, self._described.architecture)
            for key, said in self._keys().items():
                put_key(writer, key, said)
            for name, shape in self._shapes.items():
                announce(writer, name, shape, self.type_of(name))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            with temporary.open("ab") as file:
                for name in self._shapes:
                    self._append(file, name, writer.data_alignment)
            header = GgufHeader(temporary, self.model.name)
            refuse_other_model(self._described.config, gguf_config(header), self.model.name)

    def _append(self, file: BinaryIO, name: str, alignment: int) -> None:
        """Write a tensor at the end of the file, filled up to a multiple of ``alignment`` before and after it."""
        values = self._described.tensors.get(name)
        own = self._as_written(name, self.model.read(self.names[name])) if values is None else torch.from_numpy(values)
        file.write(bytes(-file.tell() % alignment))
        for part in packed(name, own.detach(), self.type_of(name)):
            file.write(part.data)
        file.write(bytes(-file.tell() % alignment))

    def _as_written(self, name: str, values: Tensor) -> Tensor:
        return as_written(self._described.architecture, name, values, self._described.config)

    def _named(self) -> dict[str, str]:
        """The plain model's names of its tensors by the file's; a head that is the embedding is not written."""
        names = tensor_names(self._plain, self._described.architecture, self._process)
        read = self.model.read
        tied = {_HEAD} if torch.equal(read(_HEAD), read(names[_EMBEDDING])) else set()
        unnamed = sorted(set(self._plain.state_dict()) - set(names.values()) - tied)
        if unnamed:
            raise ModelError(
                f"A GGUF file of the architecture {self._described.architecture} has no name for {some_of(unnamed)}; "
                f"merge into a transformers folder instead (format: folder)."
            )
        return {name: key for name, key in names.items() if key not in tied}

    def _keys(self) -> dict[str, Said]:
        kind, number = TYPES[self.storage]
        general: dict[str, Any] = {"general.type": "model", "general.file_type": int(number), **self.model.general}
        if gguf.GGML_QUANT_SIZES[kind][0] > 1:
            general["general.quantization_version"] = gguf.GGML_QUANT_VERSION
        plain = {key: Said(value) for key, value in {**general, **self._described.keys}.items()}
        return plain | self.model.tokenizer.keys


def put_key(writer: gguf.GGUFWriter, key: str, said: Said) -> None:
    """Write a key, in the types that it is given, or that follow from its value."""
    value, types = said.value, said.types
    if types is not None:
        writer.add_key_value(key, value, types[0], types[-1] if types[0] == GGUFValueType.ARRAY else None)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    """Say that a tensor comes, whose values are written later."""
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        writer.add_tensor_info(name, shape, np.dtype(plain[kind]), size_of(shape, kind))
        return
    in_bytes = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), size_of(shape, kind), raw_dtype=kind)
