"""Products in 8-bit integers, for generation: x is rounded to 8 bits, and the weight's table or the weight itself."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.coded import CodedWeight, EightBits
from veneer.kernels.operation import operation
from veneer.kernels.operations.products import coded_product

GROUP = 32  # columns of x in 8 bits that share a scale
_ROWS = 1024  # of a weight, rounded to 8 bits at once


def _fake_product4_int8(x: Tensor, weight: CodedWeight, levels: Tensor, step: float) -> Tensor:
    return x.new_empty(x.shape[0], weight.rows)


@operation("(Tensor x, {weight}, Tensor levels, float step) -> Tensor", fake=_fake_product4_int8)
def product4_int8(x: Tensor, weight: CodedWeight, levels: Tensor, step: float) -> Tensor:
    """coded_product of a weight in 4 bits with x and the table in 8: the table is step · ``levels``, int8 (16,) from
    −127 to 127, and x `in_8_bits`. Columns are a multiple of 32, so that each group is within one block of the weight:
    what is summed within it are integers."""
    return coded_product.definition(in_8_bits(x), weight._replace(table=levels.float() * step))


def _fake_product8_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


@operation("(Tensor x, Tensor codes, Tensor scales) -> Tensor", fake=_fake_product8_int8)
def product8_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x (tokens, columns), in 8 bits, times the weight that `rows_in_8_bits` made ``codes`` and ``scales`` of →
    (tokens, rows)."""
    return torch.nn.functional.linear(in_8_bits(x), unpacked8(EightBits(codes, scales, x.shape[1])))


def in_8_bits(x: Tensor) -> Tensor:
    """``x`` (tokens, columns) fp32 with each group of 32 columns rounded to integers of −127 … 127 times its scale,
    absmax / 127; a group with a NaN or infinity becomes NaN."""
    groups = x.reshape(-1, GROUP)
    absmax = groups.abs().amax(dim=1, keepdim=True)
    absmax = torch.where(absmax.isfinite(), absmax.clamp(min=1e-35), torch.nan)
    largest = absmax.new_tensor(127)  # a tensor, because torch turns 127 / absmax into 127 · (1 / absmax)
    return ((groups * (largest / absmax)).round() * (absmax / 127)).view(x.shape)


def rows_in_8_bits(weight: Tensor) -> EightBits:
    """``weight`` (rows, columns), fp32, with each row rounded to integers of −127 … 127 times its scale."""
    rows, columns = weight.shape
    codes = torch.full((rows, 2, stride8(columns)), 128, dtype=torch.uint8)
    scales = torch.empty(rows)
    for first in range(0, rows, _ROWS):
        part = slice(first, first + _ROWS)
        scales[part] = weight[part].abs().amax(dim=1).clamp(min=1e-35) / 127
        integers = (weight[part] / scales[part, None]).round_().add_(128).to(torch.uint8)
        codes[part, :, : columns // 2] = integers.view(len(integers), -1, 2).transpose(1, 2)
    return EightBits(codes, scales, columns)


def unpacked8(weight: EightBits) -> Tensor:
    """The values (rows, columns) of a weight in 8 bits."""
    apart = weight.codes[:, :, : weight.columns // 2].float() - 128
    return apart.transpose(1, 2).reshape(len(weight.codes), weight.columns) * weight.scales[:, None]


def stride8(columns: int) -> int:
    """Bytes of the even columns of a row, padded to a multiple of 64."""
    return -(-columns // 128) * 64
