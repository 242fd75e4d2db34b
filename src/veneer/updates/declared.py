"""What the header of an adapter's file declares, looked at before a tensor is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from veneer.errors import AdapterFileError

_UPDATE = re.compile(
    r"\.lora_((embedding_)?[ABE]|magnitude_vector)(\.(?!bias$)[^.]+)?(\.weight)?$|\.trainable_tokens_delta\b"
)
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_OTHERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}  # of a module trained whole: its counts
_TYPES = {"BOOL": "bool", "C64": "complex64", **{f"{s}{n}": f"{w}{n}" for s, w in (("I", "int"), ("U", "uint"))
          for n in (8, 16, 32, 64)}}  # fmt: skip


@dataclass(frozen=True)
class Declared:
    """A tensor's shape and type without the tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def refuse_header(path: Path) -> None:
    """Raises AdapterFileError where an update in the file is of no floating-point numbers, or a tensor of a type that
    nothing trains; SafetensorError where there is no readable header."""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118, it is no mapping
            piece = file.get_slice(key)
            kind = str(piece.get_dtype())
            of_update = _UPDATE.search(key) is not None
            if kind not in _FLOATS and (of_update or kind not in _OTHERS):
                raise AdapterFileError(
                    f"{path} has {key} in {_TYPES.get(kind, kind)}, and an adapter's tensors are floating-point "
                    f"numbers (float32, bfloat16, float16); save it again in one of these types."
                )


def takes(own: torch.dtype, given: torch.dtype) -> bool:
    """Whether values of a file in the type ``given`` are those of a tensor in the type ``own``, rounded at most."""
    if own.is_floating_point:
        return given.is_floating_point and (given is not torch.float64 or own is torch.float64)
    return given is own
