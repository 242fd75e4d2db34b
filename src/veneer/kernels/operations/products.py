"""Weights in codes: expanded, and multiplied without being expanded as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.coded import CodedWeight
from veneer.kernels.operation import operation

_PANEL = 2**18  # weights expanded at once by the product: 1 MB in fp32


def _fake_dequantise(weight: CodedWeight, first: int, out: Tensor) -> None:
    return None


@operation("({weight}, int first, Tensor(a!) out) -> ()", fake=_fake_dequantise)
def dequantise(weight: CodedWeight, first: int, out: Tensor) -> None:
    """Rows ``first`` and on of a weight into ``out`` (rows, columns): what a code stands for times its block's scale in
    fp32, rounded to out's type."""
    start, stop = first * out.shape[1], first * out.shape[1] + out.numel()
    if weight.table is None:
        # By a tensor, because torch may turn x / 127 into x · (1 / 127).
        largest = torch.full((), 127.0, device=weight.codes.device)
        values = (weight.codes[start:stop].float() - 127).div_(largest)
    else:
        packed = weight.codes[start // 2 : (stop + 1) // 2]
        both = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)
        values = weight.table[both[start % 2 : start % 2 + stop - start].int()]
    _multiply_by_scales(values, weight, start)
    out.copy_(values.view(out.shape))


def _multiply_by_scales(values: Tensor, weight: CodedWeight, start: int) -> None:
    """Multiply ``values`` (n,), the elements from ``start`` on, by the scales of their blocks."""
    block, stop = weight.block, start + values.numel()
    blocks = slice(start // block, (stop + block - 1) // block)
    scales = weight.scales[blocks]
    if weight.nested_table is not None and weight.nested_scales is not None and weight.offset is not None:
        groups = torch.arange(blocks.start, blocks.stop, device=values.device) // weight.nested_block
        scales = weight.nested_table[scales.int()] * weight.nested_scales[groups] + weight.offset
    skip = start - blocks.start * block
    values *= scales.repeat_interleave(block)[skip : skip + stop - start]


def _fake_product(x: Tensor, weight: CodedWeight) -> Tensor:
    return x.new_empty(x.shape[0], weight.rows)


@operation("(Tensor x, {weight}) -> Tensor", fake=_fake_product)
def coded_product(x: Tensor, weight: CodedWeight) -> Tensor:
    """A new x Wᵀ (tokens, rows) of ``x`` (tokens, columns), both fp32; a panel of W at a time."""
    y = x.new_empty(x.shape[0], weight.rows)
    height = max(1, _PANEL // max(1, weight.columns))
    for first in range(0, weight.rows, height):
        panel = x.new_empty(min(height, weight.rows - first), weight.columns)
        dequantise.definition(weight, first, panel)
        y[:, first : first + height] = x @ panel.t()
    return y
