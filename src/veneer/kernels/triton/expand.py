"""Weights in codes, expanded: a whole weight at once into a buffer, whose rows may be apart."""

import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.coded import CodedWeight
from veneer.kernels.operations import products
from veneer.kernels.triton.coded import arguments_of, constants_of, scale_of, value_of
from veneer.kernels.triton.launch import EXACT, TYPES, power_of_two

_WIDTH = 1024  # columns of a tile


@triton.jit
def expand_rows(
    codes, table, scales, nested_table, nested_scales, offset, out, first, columns, stride,
    FOUR: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Elements of any rows of any blocks: each looks for its own code and scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    keep = column < columns
    place = (first + row) * columns + column
    scale = scale_of(scales, nested_table, nested_scales, offset, place // BLOCK, keep, NESTED_BLOCK)
    value = value_of(codes, table, place, keep, FOUR) * scale
    tl.store(out + row * stride + column, value.to(out.dtype.element_ty), mask=keep)


@triton.jit
def expand_blocks(
    codes, table, scales, nested_table, nested_scales, offset, out, first, row_blocks, stride,
    FOUR: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Rows of whole blocks: each byte is read once, and each scale."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    keep = at < row_blocks
    block = (first + row) * row_blocks + at
    scale = scale_of(scales, nested_table, nested_scales, offset, block, keep, NESTED_BLOCK)
    if FOUR:
        byte = tl.load(
            codes + block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :], mask=keep[:, None], other=0
        )
        pair = tl.join(tl.load(table + (byte >> 4).to(tl.int32)), tl.load(table + (byte & 15).to(tl.int32)))
        value = tl.reshape(pair, (BLOCKS, BLOCK))
    else:
        place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        value = value_of(codes, table, place, keep[:, None], FOUR)
    into = out + row * stride + at[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(into, (value * scale[:, None]).to(out.dtype.element_ty), mask=keep[:, None])


def triton_dequantise(weight: CodedWeight, first: int, out: Tensor) -> None:
    height, columns = out.shape
    if columns != weight.columns or not 0 <= first <= first + height <= weight.rows:
        raise ValueError(
            f"Rows {first} to {first + height} of {columns} columns are not in a weight of {weight.rows} × "
            f"{weight.columns}."
        )
    if out.device != weight.codes.device:
        raise ValueError(f"out is on {out.device}, and the weight on {weight.codes.device}.")
    if out.dtype not in TYPES or (columns > 1 and out.stride(1) != 1):
        return products.dequantise.definition(weight, first, out)
    if out.numel():
        _expand(weight, first, out)
    return None


def _expand(weight: CodedWeight, first: int, out: Tensor) -> None:
    height, columns = out.shape
    tensors, constants, block = arguments_of(weight), constants_of(weight), weight.block
    if columns % block == 0 and block & (block - 1) == 0:
        row_blocks = columns // block
        blocks = max(1, min(power_of_two(row_blocks), _WIDTH // block))
        expand_blocks[(height, triton.cdiv(row_blocks, blocks))](
            *tensors, out, first, row_blocks, out.stride(0), **constants, BLOCKS=blocks, **EXACT
        )
    else:
        width = min(_WIDTH, power_of_two(columns))
        expand_rows[(height, triton.cdiv(columns, width))](
            *tensors, out, first, columns, out.stride(0), **constants, WIDTH=width, **EXACT
        )
