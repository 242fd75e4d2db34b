"""What a GGUF file says before its tensors' values: keys, and where each tensor is. Read once."""

from __future__ import annotations

from mmap import ACCESS_READ, mmap
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, GGUFValueType, dequantize

from veneer.errors import ModelError
from veneer.models.library import call_library, no_model, unreadable

_ARRAY, _LENGTH = Struct("<IQ"), Struct("<Q")
_TYPE = 4  # bytes of a value's type
_LONG = 1000  # elements: of a vocabulary, not of layers


class Stored(NamedTuple):
    """Where a tensor is in a GGUF file."""

    name: str
    type: Any
    shape: tuple[int, ...]
    offset: int  # bytes
    size: int  # bytes


class _Reader(GGUFReader):  # type: ignore[misc]
    """gguf's reader makes arrays of each word of a vocabulary, of its type and score, which takes it half a minute for
    128,000 words and their merges. Nothing here asks for them."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        kind, count = _ARRAY.unpack_from(self.data, orig_offs) if raw_type == GGUFValueType.ARRAY else (None, 0)
        if count < _LONG or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        size = _ARRAY.size
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                size += _LENGTH.size + _LENGTH.unpack_from(self.data, orig_offs + size)[0]
        else:
            size += count * np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
        return size, [], [], [GGUFValueType.ARRAY, GGUFValueType(kind)]


class GgufHeader:
    """The keys and tensors of the GGUF file ``path``, of the model ``name``.

    ``metadata``: values by key; None for long arrays, which are a vocabulary's. Raises ModelError for a damaged
    file.
    """

    def __init__(self, path: Path, name: str) -> None:
        reader = call_library(_Reader, no_model(name), path)
        self.path, self.name = path, name
        # Without the reader's own tensors, which would keep the file mapped.
        self.tensors = {
            t.name: Stored(
                t.name, t.tensor_type, tuple(map(int, reversed(t.shape))), int(t.data_offset), int(t.n_bytes)
            )
            for t in reader.tensors
        }
        self.swapped = reader.byte_order == "S"
        self._fields = {key: (int(field.offset), list(field.types)) for key, field in reader.fields.items()}
        self.metadata = {key: call_library(_value, no_model(name), field) for key, field in reader.fields.items()}
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError(f"{no_model(name)}: its header has no general.architecture.")
        self.architecture = architecture

    def holds(self, ending: str) -> bool:
        """Whether any tensor's name ends so."""
        return any(tensor.endswith(ending) for tensor in self.tensors)

    def stored_as(self, key: str) -> tuple[Any, list[Any]]:
        """A key's value, all of a long array, too, and its gguf types: of an array ARRAY, and that of its values."""
        offset, types = self._fields[key]
        value = self.metadata[key]
        if value is None and types[:1] == [GGUFValueType.ARRAY]:
            value = self._long_array(offset + _LENGTH.size + len(key.encode()) + _TYPE)
        return value, types

    def _long_array(self, offset: int) -> list[Any]:
        with self.path.open("rb") as file:
            data = mmap(file.fileno(), 0, access=ACCESS_READ)
        kind, count = _ARRAY.unpack_from(data, offset)
        start = offset + _ARRAY.size
        if kind != GGUFValueType.STRING:
            numbers = np.frombuffer(data, GGUFReader.gguf_scalar_to_np[GGUFValueType(kind)], count, start)
            return list(numbers.tolist())
        words = []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, start)
            start += _LENGTH.size
            words.append(data[start : start + length].decode())
            start += length
        return words

    def expand(self, tensor: str) -> np.ndarray[Any, np.dtype[Any]]:
        """A tensor's values, expanded to fp32 but in the file's order. Raises ModelError for a type that cannot be."""
        stored = self.tensors[tensor]
        with self.path.open("rb") as file:
            packed = np.fromfile(file, np.uint8, stored.size, offset=stored.offset)
        try:
            values: np.ndarray[Any, np.dtype[Any]] = dequantize(packed.reshape(*stored.shape[:-1], -1), stored.type)
        except NotImplementedError as error:  # a type that gguf knows by its name alone
            raise unreadable(self.name, error) from error
        return values


def _value(field: Any) -> Any:
    """A key's value. A float of 32 bits is the shortest decimal that is this float: 1e-06, not 9.99999997e-07."""
    values = [_scalar(field.parts[i], field.types[-1]) for i in field.data]
    if field.types[:1] == [GGUFValueType.ARRAY]:
        return values or None
    return values[0]


def _scalar(part: Any, kind: GGUFValueType) -> Any:
    if kind == GGUFValueType.STRING:
        return bytes(part).decode()
    value = part.tolist()[0]
    return float(str(np.float32(value))) if kind == GGUFValueType.FLOAT32 else value
