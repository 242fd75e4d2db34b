"""Block-wise 4-bit storage: a scale for each block of codes, the scales themselves in 8 bits (arXiv:2305.14314, 3).

The definition, in plain PyTorch. Codes and scales are those of bitsandbytes for the same input, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import ModelError
from veneer.frozen.codebook import dynamic8, nf4

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a scale of their own


@dataclass(frozen=True)
class Quantised:
    """A weight of ``shape`` (out, in): two codes a byte, the first in the high half; blocks run on over row ends."""

    codes: Tensor  # uint8 (⌈out · in / 2⌉,)
    scale_codes: Tensor  # uint8 (blocks,)
    scale_scales: Tensor  # fp32 (⌈blocks / 256⌉,)
    offset: Tensor  # fp32 (): mean of the scales, which the 8-bit codes are relative to
    shape: tuple[int, int]


def quantise(weight: Tensor, name: str = "the weight") -> Quantised:
    """NF4 with double quantisation of ``weight`` (out, in): 4.127 bits a parameter.

    Raises ModelError when ``weight``, called ``name`` in the message, holds a NaN or an infinity.
    """
    flat = weight.detach().float().reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise ModelError(f"{name} holds a value that is not finite, so it cannot be kept in 4 bits.")
    blocks = _in_blocks(flat, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    # A reciprocal multiply, as bitsandbytes does it: dividing would round some codes the other way.
    scaled = (blocks * _reciprocal(absmax)[:, None]).clamp_(-1, 1)
    codes = _nearest(scaled.reshape(-1)[: flat.numel() + flat.numel() % 2], nf4().to(flat.device))
    packed = (codes[0::2] << 4) | codes[1::2]
    offset = absmax.mean()
    centred = _in_blocks(absmax - offset, NESTED_BLOCK)
    scale_scales = centred.abs().amax(dim=1)
    scale_codes = _nearest(
        (centred * _reciprocal(scale_scales)[:, None]).reshape(-1)[: absmax.numel()], dynamic8().to(flat.device)
    )
    return Quantised(packed, scale_codes, scale_scales, offset, (weight.shape[0], weight.shape[1]))


def scales(quantised: Quantised) -> Tensor:
    """The scale of every block, fp32 (blocks,)."""
    q = quantised
    values = dynamic8().to(q.codes.device)[q.scale_codes.int()]
    nested = q.scale_scales.repeat_interleave(NESTED_BLOCK)[: values.numel()]
    return values * nested + q.offset


def expand(quantised: Quantised, block_scales: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows ``first`` up to ``last`` of the weight, (last − first, in), expanded in fp32 and rounded to ``dtype``."""
    columns = quantised.shape[1]
    start, stop = first * columns, last * columns
    packed = quantised.codes[start // 2 : (stop + 1) // 2]
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)
    codes = codes[start % 2 : start % 2 + stop - start]
    values = nf4().to(packed.device)[codes.int()]
    first_block, last_block = start // BLOCK, (stop + BLOCK - 1) // BLOCK
    by_element = block_scales[first_block:last_block].repeat_interleave(BLOCK)
    skip = start - first_block * BLOCK
    values *= by_element[skip : skip + stop - start]
    return values.view(last - first, columns).to(dtype)


def _in_blocks(flat: Tensor, block: int) -> Tensor:
    """(n,) → (⌈n / block⌉, block), the tail padded with zeros, which change no block's largest value."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _reciprocal(absmax: Tensor) -> Tensor:
    """1 / absmax; 0 for a block of zeros, or of values whose reciprocal overflows, which so becomes zero."""
    reciprocal = 1 / absmax
    return torch.where(torch.isfinite(reciprocal), reciprocal, torch.zeros_like(absmax))


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """uint8 index of the nearest entry of the ascending ``table``; a tie goes to the lower one."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
