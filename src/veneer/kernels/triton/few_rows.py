"""A few rows of x by a weight in codes, which is expanded in registers: for generation, a token at a time."""

import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.coded import CodedWeight
from veneer.kernels.operations import products
from veneer.kernels.triton.coded import arguments_of, constants_of, scale_of, value_of
from veneer.kernels.triton.launch import check_like, kernels_take

FEW = 16  # rows of x: the least that tensor cores multiply at once
_OUT = 16  # rows of the weight for a program
_COLUMNS = {2: 128, 4: 32}  # of the weight at a time, by bytes of a number: fp32 is multiplied in registers


@triton.jit
def few_rows_by_codes(
    x, codes, table, scales, nested_table, nested_scales, offset, y, tokens, columns, rows,
    FOUR: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    FEW: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weight is rounded to x's type, as it is where it is expanded; the sum is in fp32."""
    row = (tl.program_id(0) * OUT + tl.arange(0, OUT))[None, :]
    token = tl.arange(0, FEW)[:, None]
    total = tl.zeros((FEW, OUT), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        keep = (row < rows) & (column[:, None] < columns)
        place = row.to(tl.int64) * columns + column[:, None]
        scale = scale_of(scales, nested_table, nested_scales, offset, place // BLOCK, keep, NESTED_BLOCK)
        value = tl.where(keep, value_of(codes, table, place, keep, FOUR) * scale, 0.0).to(x.dtype.element_ty)
        part = tl.load(
            x + token.to(tl.int64) * columns + column[None, :],
            mask=(token < tokens) & (column[None, :] < columns), other=0.0,
        )  # fmt: skip
        total = tl.dot(part, value, total, input_precision="ieee")
    tl.store(y + token.to(tl.int64) * rows + row, total.to(y.dtype.element_ty), mask=(token < tokens) & (row < rows))


def triton_coded_product(x: Tensor, weight: CodedWeight) -> Tensor:
    if not (kernels_take(x) and len(x) <= FEW):
        return products.coded_product.definition(x, weight)
    check_like("x", x, weight.codes, (len(x), weight.columns))
    x, y = x.contiguous(), x.new_empty(len(x), weight.rows)
    if weight.rows:
        few_rows_by_codes[(triton.cdiv(weight.rows, _OUT),)](
            x, *arguments_of(weight), y, len(x), weight.columns, weight.rows, **constants_of(weight),
            FEW=FEW, OUT=_OUT, COLUMNS=_COLUMNS[x.itemsize],
        )  # fmt: skip
    return y
