"""A safetensors file written and read a part of a tensor at a time, for tensors that need not fit in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.uint8: "U8",
}  # fmt: skip


class Streamed(NamedTuple):
    """A tensor that is not in memory as a whole: ``parts`` gives its elements in order, in 1-D pieces."""

    shape: torch.Size
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]


def write_streamed(tensors: dict[str, Tensor | Streamed], path: Path) -> None:
    """Write what ``safetensors.torch.load_file`` reads; one part is in memory at a time. Raises OSError."""
    # Wide types first, as safetensors has them, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.shape.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            parts = tensor.parts() if isinstance(tensor, Streamed) else [tensor.detach().cpu()]
            for part in parts:
                file.write(_bytes(part.contiguous()))


class TensorFile:
    """A safetensors file whose tensors can be read in parts into existing memory.

    Raises safetensors.SafetensorError or OSError when the file is damaged or cut short.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as whole:  # checks the header against the file's size
            self.names: list[str] = list(whole.keys())
        self._path = path
        with path.open("rb") as file:
            self._start = 8 + (length := int.from_bytes(file.read(8), "little"))
            self._header = json.loads(file.read(length))

    def tensor(self, name: str) -> Tensor:
        """A whole tensor. Raises KeyError for an unknown name."""
        with safe_open(self._path, framework="pt") as whole:
            tensor: Tensor = whole.get_tensor(name)
        return tensor

    def reader(self, name: str, dtype: torch.dtype, shape: torch.Size) -> Callable[[Tensor], None]:
        """What fills the 1-D contiguous tensors that it is called with, one after the other, with the elements.

        Raises KeyError for an unknown name, ValueError when the tensor has another type or shape.
        """
        entry = self._header[name]
        if entry["dtype"] != _NAMES[dtype] or entry["shape"] != list(shape):
            raise ValueError(f"{name} is {entry['dtype']} {entry['shape']}, not {_NAMES[dtype]} {list(shape)}")
        at = self._start + entry["data_offsets"][0]

        def read(part: Tensor) -> None:
            nonlocal at
            with self._path.open("rb") as file:
                file.seek(at)
                at += file.readinto(_bytes(part))

        return read


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
