"""How a weight in codes is stored, as the kernels take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CodedWeight(NamedTuple):
    """A weight (rows, columns) in codes with a scale for each ``block`` of elements in row-major order
    (arXiv:2305.14314, section 3). Blocks run on over row ends; the last one may be short.

    In 4 bits, two codes share a byte, the first in the high half, and ``table`` says what a code stands for. In int8
    storage a code takes a byte and stands for (code − 127) / 127, and there is no table. A block's scale is fp32, or
    nested: ``nested_table[scale] · nested_scales[block // nested_block] + offset``.

    The fields, in their order, are the weight's arguments of every operator that takes one (`SCHEMA`).
    """

    codes: Tensor  # uint8 (⌈rows · columns / 2⌉,), or of int8 storage (rows · columns,)
    table: Tensor | None  # fp32 (16,)
    scales: Tensor  # fp32 (blocks,), or uint8 (blocks,) where they are nested
    nested_table: Tensor | None  # fp32 (256,)
    nested_scales: Tensor | None  # fp32 (⌈blocks / nested_block⌉,)
    offset: Tensor | None  # fp32 ()
    block: int  # elements, a multiple of 32
    nested_block: int  # scales, a power of two
    rows: int
    columns: int


SCHEMA = (
    "Tensor codes, Tensor? table, Tensor scales, Tensor? nested_table, Tensor? nested_scales, Tensor? offset, "
    "int block, int nested_block, int rows, int columns"
)


class Levels(NamedTuple):
    """A table of 4-bit codes rounded to 8 bits: step · values."""

    values: Tensor  # int8 (16,), from −127 to 127
    step: float


class EightBits(NamedTuple):
    """A weight (rows, columns) in integers of −127 … 127 times a scale for each row, stored for products with x in
    8 bits: the integers plus 128, even and odd columns apart (`rows_in_8_bits` makes it)."""

    codes: Tensor  # uint8 (rows, 2, stride8(columns))
    scales: Tensor  # fp32 (rows,)
    columns: int
