"""Weights to codes and scales, and the nearest of 256 values."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.operation import operation


def _fake_quantise4(weight: Tensor, boundaries: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    size = weight.numel()
    return weight.new_empty((size + 1) // 2, dtype=torch.uint8), weight.new_empty((size + block - 1) // block)


@operation(
    "(Tensor weight, Tensor boundaries, Tensor order, int block) -> (Tensor, Tensor)",
    fake=_fake_quantise4,
)
def quantise4(weight: Tensor, boundaries: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 (⌈n / 2⌉,) and absmax fp32 (blocks,) of ``weight`` (n,) fp32; an odd tail is padded with 0.0.

    An element's interval is the number of ``boundaries`` (15,), fp32 ascending, below x · (1 / absmax), so that a tie
    goes to the lower one; its code is ``order[interval]``, uint8 (16,). A block's NaN or infinity is in its absmax; its
    codes then mean nothing.
    """
    scaled, absmax = _scaled(weight, block)
    codes = order[torch.bucketize(scaled[: weight.numel() + weight.numel() % 2], boundaries, out_int32=True)]
    return (codes[0::2] << 4) | codes[1::2], absmax


def _fake_quantise8(weight: Tensor, boundaries: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = (weight.numel() + block - 1) // block
    return torch.empty_like(weight, dtype=torch.uint8), weight.new_empty(blocks)


@operation("(Tensor weight, Tensor boundaries, int block) -> (Tensor, Tensor)", fake=_fake_quantise8)
def quantise8(weight: Tensor, boundaries: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """quantise4 to int8: codes uint8 (n,), the intervals between ``boundaries`` (254,)."""
    scaled, absmax = _scaled(weight, block)
    return torch.bucketize(scaled[: weight.numel()], boundaries, out_int32=True).to(torch.uint8), absmax


def _scaled(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Each element over its block's absmax, padded with zeros to whole blocks; and absmax (blocks,)."""
    blocks = torch.nn.functional.pad(weight, (0, -weight.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    # A reciprocal multiply, as bitsandbytes does it: dividing would round some codes the other way.
    return (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).reshape(-1), absmax


def _fake_nearest8(values: Tensor, boundaries: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=torch.uint8)


@operation("(Tensor values, Tensor boundaries) -> Tensor", fake=_fake_nearest8)
def nearest8(values: Tensor, boundaries: Tensor) -> Tensor:
    """How many of the ascending ``boundaries`` (255,) are below each of ``values`` (n,), both fp32 and finite: uint8
    (n,), the nearest of 256 ascending values where the boundaries are the midpoints between them."""
    return torch.bucketize(values, boundaries, out_int32=True).to(torch.uint8)
