"""AdamW's moments in 8 bits (Dettmers et al., 2022, arXiv:2110.02861): a scale for each 256 of them, and the nearest
code of a dynamic map, signed for the first moment and unsigned for the second. The maps are bitsandbytes'."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from veneer.frozen.codebook import dynamic8, search

BLOCK = 256  # moments that share a scale
_SMALLEST = 1e-38  # what a block is divided by at least: one of zeros has no scale


def state_bytes(parameters: int, bits: int) -> int:
    """Bytes of both moments of so many parameters: 2 · 4 n, or in 8 bits 2 · (1 + 4 / block) n."""
    return 8 * parameters if bits == 32 else math.ceil(2 * (1 + 4 / BLOCK) * parameters)


def code(moment: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """Fill ``codes`` (n,), uint8, and ``scales`` (⌈n / 256⌉,), fp32, with those of ``moment`` (n,).

    A second moment (unsigned) that is not zero never becomes zero, which may be the nearest code: an update would be
    divided by epsilon alone.
    """
    blocks = pad(moment.float(), (0, -len(moment) % BLOCK)).view(-1, BLOCK)
    torch.amax(blocks.abs(), dim=1, out=scales)
    values = (blocks / scales.clamp(min=_SMALLEST)[:, None]).view(-1)[: len(moment)]
    how = search("dynamic8" if signed else "dynamic8 unsigned", moment.device)
    how.nearest(values, torch.empty_like(values, dtype=torch.int32), codes)
    if not signed:
        torch.maximum(codes, (moment > 0).to(torch.uint8), out=codes)


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The moment (n,), fp32."""
    values = dynamic8(signed, codes.device)[codes.int()]
    return values.mul_(scales.repeat_interleave(BLOCK)[: len(codes)])
