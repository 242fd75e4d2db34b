"""Block-wise 4-bit storage: a scale for each block of codes, the scales themselves in 8 bits (arXiv:2305.14314, 3).

Codes and scales are those of bitsandbytes for the same input, bit for bit. The loops are in veneer.kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.errors import ModelError
from veneer.frozen.codebook import dynamic8, nf4
from veneer.kernels.operators import dequantise4, product4, quantise4

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
    table = nf4().to(weight.device)
    order = torch.arange(16, dtype=torch.uint8, device=weight.device)
    flat = weight.detach().float().reshape(-1)
    packed, absmax = quantise4(flat, _boundaries(table), order, BLOCK)
    if not bool(torch.isfinite(absmax).all()):
        raise ModelError(f"{name} holds a value that is not finite, so it cannot be kept in 4 bits.")
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
    out = quantised.codes.new_empty(last - first, quantised.shape[1], dtype=dtype)
    table = nf4().to(out.device)
    dequantise4(quantised.codes, table, block_scales, None, None, None, BLOCK, NESTED_BLOCK, first, out)
    return out


def expand_into(out: Tensor, quantised: Quantised, first: int) -> None:
    """Rows ``first`` and on into ``out`` (rows, in), expanded in fp32 and rounded to its type."""
    dequantise4(*_stored(quantised), BLOCK, NESTED_BLOCK, first, out)


def few_token_product(x: Tensor, quantised: Quantised) -> Tensor:
    """A new x Wᵀ (tokens, out) of ``x`` (tokens, in), fp32, of at most FEW tokens; W is expanded in registers."""
    y: Tensor = product4(x, *_stored(quantised), BLOCK, NESTED_BLOCK, quantised.shape[0])
    return y


def _stored(quantised: Quantised) -> tuple[Tensor, ...]:
    """A weight as the operators take it."""
    q, device = quantised, quantised.codes.device
    return q.codes, nf4().to(device), q.scale_codes, dynamic8().to(device), q.scale_scales, q.offset


def _in_blocks(flat: Tensor, block: int) -> Tensor:
    """(n,) → (⌈n / block⌉, block), the tail padded with zeros, which change no block's largest value."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _reciprocal(absmax: Tensor) -> Tensor:
    """1 / absmax; 0 for a block of zeros, or of values whose reciprocal overflows, which so becomes zero."""
    reciprocal = 1 / absmax
    return torch.where(torch.isfinite(reciprocal), reciprocal, torch.zeros_like(absmax))


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """uint8 index of the nearest entry of the ascending ``table``; a tie goes to the lower one."""
    return torch.bucketize(values, _boundaries(table), out_int32=True).to(torch.uint8)


def _boundaries(table: Tensor) -> Tensor:
    """The midpoints between the entries of an ascending ``table``."""
    return (table[:-1] + table[1:]) / 2
