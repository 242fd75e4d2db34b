"""How a GGUF file's tensors are kept: the types by name, which tensor gets which, and the values rounded to one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from veneer.errors import ModelError
from veneer.kernels.operations.gguf_blocks import gguf_blocks
from veneer.models.gguf_layout import Array

# Veneer's names of storages → the type of matrices, and the number by which general.file_type says it.
TYPES = {
    "fp32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "fp16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
}
_ROUNDED_LESS = ("token_embd.weight", "output.weight")  # whose rounding costs most, so that they get 8 bits
_PLAIN = ("position_embd.weight",)
_AT_ONCE = 1 << 19  # values that are rounded together: they stay in the processor's cache until they are written
_LARGEST = torch.finfo(torch.float16).max


def type_of(name: str, shape: tuple[int, ...], storage: str) -> Type:
    """The type of a tensor in a file of ``storage``: norms and biases are fp32; a row that is no multiple of a block
    is fp16."""
    kind = TYPES[storage][0]
    if len(shape) < 2 or name in _PLAIN or name.startswith("rope_"):
        return Type.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if block == 1:
        return kind
    if shape[-1] % block:
        return Type.F16
    return Type.Q8_0 if name in _ROUNDED_LESS else kind


def size_of(shape: tuple[int, ...], kind: Type) -> int:
    """Bytes of a tensor."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)


def packed(name: str, values: Tensor, kind: Type) -> Iterator[Array]:
    """The bytes of a tensor's ``values``, of any float type, in a type, a few of its rows at a time. Raises ModelError
    where they are beyond the type's numbers."""
    rows = values.reshape(1, -1) if values.dim() < 2 else values
    step = max(1, _AT_ONCE * len(rows) // max(1, rows.numel()))
    for part in torch.split(rows, step):
        yield _packed(name, part.float().contiguous(), kind)


def _packed(name: str, values: Tensor, kind: Type) -> Array:
    if kind == Type.F32:
        made = values
    elif kind == Type.BF16:
        made = values.bfloat16().view(torch.int16)
    else:
        low, high = map(float, values.aminmax()) if values.numel() else (0.0, 0.0)
        largest = max(-low, high)
        if not largest <= _LARGEST:  # nor a NaN
            raise ModelError(f"{name} has a value of {largest:.3g}, which {kind.name} cannot hold; use bf16 or fp32.")
        made = values.half() if kind == Type.F16 else gguf_blocks(values, kind.name)
    array: Array = made.numpy()
    return array


def kept_in_fp16(shapes: dict[str, tuple[int, ...]], storage: str) -> list[str]:
    """The matrices that a file of ``storage`` keeps in fp16, since their rows are no multiple of a block."""
    if TYPES[storage][0] == Type.F16:
        return []
    return [name for name, shape in shapes.items() if type_of(name, shape, storage) == Type.F16]
