"""Block-wise storage: a scale for each block of codes, the scales themselves in 8 bits (arXiv:2305.14314, section 3).

The definition, in plain PyTorch. Codes and scales are those of bitsandbytes for the same input, bit for bit; the 8-bit
codes of the scales are the nearest ones, which its table of 65,536 bins misses in a few of a thousand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from veneer.errors import ModelError
from veneer.frozen.codebook import codebook, dynamic8, levels8, search
from veneer.frozen.config import CODE_BITS
from veneer.kernels.backends import backend_of
from veneer.kernels.coded import CodedWeight, Levels
from veneer.kernels.operations.products import coded_product, dequantise
from veneer.kernels.operations.quantise import nearest8, quantise4, quantise8

NESTED_BLOCK = 256  # scales that share a scale of their own
_CHUNK = 2**18  # weights quantised at once: beside the result, quantising takes a few megabytes
_LARGE_CHUNK = 2**22  # the same where no fp32 copy of them is made, only 2 MB of codes
PANEL = 2**21  # weights of a panel: 8 MB in fp32. Smaller ones make more products, each with fewer terms to a sum
_room = threading.local()
_SMALLEST = 1e-38  # what a block is divided by at least, so that the reciprocal is finite


@dataclass(frozen=True)
class Quantised:
    """A weight of ``shape`` (out, in), kept as codes; blocks run on over row ends, the last one may be short.

    Two 4-bit codes share a byte, the first in the high half. The scale of a block, its largest absolute value, is a
    float, or with double quantisation an 8-bit code: ``dynamic8[code] · nested_scale + offset``.
    """

    storage: str
    block_size: int
    shape: tuple[int, int]
    codes: Tensor  # uint8 (⌈out · in · bits / 8⌉,)
    scales: Tensor  # fp32 (blocks,), or uint8 (blocks,)
    nested_scales: Tensor | None = None  # fp32 (⌈blocks / 256⌉,)
    offset: Tensor | None = None  # fp32 (): mean of the scales

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // self.block_size)

    @property
    def coded(self) -> CodedWeight:
        """The same as the kernels take it: with what the codes of its storage and of its scales stand for."""
        device = self.codes.device
        table = table_of(self.storage, device) if CODE_BITS[self.storage] == 4 else None
        nested_table = None if self.nested_scales is None else dynamic8(device=device)
        return CodedWeight(
            self.codes, table, self.scales, nested_table, self.nested_scales, self.offset, self.block_size,
            NESTED_BLOCK, *self.shape,
        )  # fmt: skip

    @property
    def levels(self) -> Levels:
        """The table of a storage of 4 bits, in 8 bits."""
        values, step = levels8(self.storage)
        return Levels(values.to(self.codes.device), step)


def quantise(
    weight: Tensor,
    name: str = "the weight",
    *,
    storage: str = "nf4",
    block_size: int = 64,
    double_quantisation: bool = True,
) -> Quantised:
    """``weight`` (out, in) of any floating-point type, from its fp32 values, in ``storage``: nf4, fp4, int4 or int8.

    Raises ModelError when ``weight``, called ``name`` in the message, holds a NaN or an infinity.
    """
    flat = weight.detach().reshape(-1).contiguous()  # of a strided weight a view has strides, too
    size, blocks = flat.numel(), -(-flat.numel() // block_size)
    codes = torch.empty(-(-size * CODE_BITS[storage] // 8), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    a_byte = 8 // CODE_BITS[storage]  # codes
    chunk = _LARGE_CHUNK if flat.dtype == torch.float32 else _CHUNK
    for start in range(0, size, chunk):
        part = flat[start : start + chunk].float()
        # The kernels take whole blocks; of the last one that is short, bitsandbytes makes an exception.
        whole = len(part) - len(part) % block_size
        if whole:
            _keep(
                _quantise_blocks(part[:whole], storage, block_size),
                codes[start // a_byte :],
                scales[start // block_size :],
            )
        if whole < len(part):
            start += whole
            _keep(_quantise_short(part[whole:], storage), codes[start // a_byte :], scales[start // block_size :])
    if not bool(torch.isfinite(scales).all()):  # a NaN or an infinity is its block's largest value
        raise ModelError(f"{name} holds a value that is not finite, so it cannot be kept as {storage}.")
    quantised = Quantised(storage, block_size, (weight.shape[0], weight.shape[1]), codes, scales)
    return _with_nested_scales(quantised) if double_quantisation else quantised


def _keep(quantised: tuple[Tensor, Tensor], codes: Tensor, scales: Tensor) -> None:
    codes[: len(quantised[0])], scales[: len(quantised[1])] = quantised


def _quantise_blocks(flat: Tensor, storage: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and absmax of whole blocks."""
    how = search(storage, flat.device)
    if CODE_BITS[storage] == 8:  # whose codes ascend
        return quantise8(flat, how.midpoints, block_size)
    return quantise4(flat, how.midpoints, how.codes, block_size)


def _quantise_short(flat: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """Codes and absmax (1,) of a block that is short, which bitsandbytes divides by its scale instead of multiplying by
    the reciprocal, and whose scale it does not let be zero; an odd tail is padded with a zero."""
    absmax = flat.abs().amax().clamp_(min=_SMALLEST)
    scaled = torch.nn.functional.pad(flat / absmax, (0, flat.numel() % 2))
    places, codes = torch.empty_like(scaled, dtype=torch.int32), torch.empty_like(scaled, dtype=torch.uint8)
    search(storage, flat.device).nearest(scaled, places, codes)
    packed = codes[: flat.numel()] if CODE_BITS[storage] == 8 else (codes[0::2] << 4) | codes[1::2]
    return packed, absmax[None]


def _with_nested_scales(quantised: Quantised) -> Quantised:
    absmax = quantised.scales
    offset = absmax.cpu().mean().to(absmax.device)  # another device would sum in another order, to other bits
    centred = _in_blocks(absmax - offset, NESTED_BLOCK)
    nested = centred.abs().amax(dim=1)
    scaled = (centred * (1 / nested.clamp(min=_SMALLEST))[:, None]).view(-1)[: absmax.numel()]
    scales = nearest8(scaled.clamp_(-1, 1), search("dynamic8", absmax.device).midpoints)
    return Quantised(
        quantised.storage, quantised.block_size, quantised.shape, quantised.codes, scales, nested, offset
    )  # fmt: skip


def expand(quantised: Quantised, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows ``first`` up to ``last`` of the weight, (last − first, in): code times scale in fp32, rounded to ``dtype``
    once. They are a view of the thread's buffer, good until its next call."""
    q, shape = quantised, (last - first, quantised.shape[1])
    out = _buffer("values", shape[0] * shape[1], dtype, q.codes.device).view(shape)
    dequantise(q.coded, first, out)
    return out


def few_row_product(x: Tensor, quantised: Quantised) -> Tensor:
    """A new x Wᵀ (tokens, out) of ``x`` (tokens, in) of few rows (`Backend.few_rows`); W is expanded in registers."""
    return coded_product(x, quantised.coded)


def prepared_int8(quantised: Quantised) -> Callable[[Tensor], Tensor]:
    """few_row_product of a weight in 4 bits with x and the table in 8: x (tokens, in), fp32 → (tokens, out)."""
    return backend_of(quantised.codes.device.type).prepared_int8(quantised.coded, quantised.levels)


def panels(quantised: Quantised, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight a panel of rows after another: which rows, and their values (rows, in) in ``dtype``.

    All panels of a thread are expanded into one buffer: a panel holds until the next one is taken.
    """
    height = max(1, PANEL // max(1, quantised.shape[1]))
    for first in range(0, quantised.shape[0], height):
        last = min(first + height, quantised.shape[0])
        yield slice(first, last), expand(quantised, first, last, dtype)


def converted(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """`panels` of a weight (out, in) that is kept in another floating-point type."""
    height = max(1, PANEL // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], height):
        part = weight[first : first + height]
        room = _buffer("values", part.numel(), dtype, part.device)
        # Laid out as the weight is: a transposed one is copied along its own rows.
        panel = room.view(part.shape) if part.stride(1) == 1 else room.view(part.shape[::-1]).t()
        yield slice(first, first + len(part)), panel.copy_(part)


def dense(quantised: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole weight (out, in), expanded into a new tensor."""
    whole = torch.empty(quantised.shape, dtype=dtype, device=quantised.codes.device)
    for rows, panel in panels(quantised, dtype):
        whole[rows] = panel
    return whole


@cache
def table_of(storage: str, device: torch.device) -> Tensor:
    """The value of each code of 4 bits, fp32 (16,)."""
    values = codebook(storage)
    # INT4 has 15 values: its sixteenth code is never written, and NaN where a damaged file has it.
    return torch.nn.functional.pad(values, (0, 16 - len(values)), value=float("nan")).to(device)


def _buffer(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size,) of the buffer that this thread reuses under ``name``; it grows to the largest size requested.

    A fresh tensor for each panel would cost its page faults, and leave holes between the tensors that stay.
    """
    buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = _room.__dict__.setdefault("buffers", {})
    key = (name, dtype, device)
    if key not in buffers or len(buffers[key]) < size:
        buffers[key] = torch.zeros(size, dtype=dtype, device=device)
    return buffers[key][:size]


def _in_blocks(flat: Tensor, block: int) -> Tensor:
    """(n,) → (⌈n / block⌉, block), the tail padded with zeros, which change no block's largest value."""
    short = -flat.numel() % block
    return (torch.nn.functional.pad(flat, (0, short)) if short else flat).view(-1, block)
