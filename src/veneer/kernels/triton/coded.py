"""What codes of a weight stand for, and their scales."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.coded import CodedWeight
from veneer.kernels.triton.launch import check_tensor


@triton.jit
def value_of(codes, table, place, keep, FOUR: tl.constexpr):
    """What the codes of the elements at ``place`` stand for, before their scales."""
    if FOUR:
        byte = tl.load(codes + place // 2, mask=keep, other=0)
        value = tl.load(table + tl.where(place % 2 == 0, byte >> 4, byte & 15).to(tl.int32))
    else:
        byte = tl.load(codes + place, mask=keep, other=0)
        value = tl.div_rn(byte.to(tl.float32) - 127.0, 127.0 + tl.zeros_like(byte).to(tl.float32))
    return value


@triton.jit
def scale_of(scales, nested_table, nested_scales, offset, block, keep, NESTED_BLOCK: tl.constexpr):
    """The scale of each ``block``, nested where NESTED_BLOCK is not 0."""
    if NESTED_BLOCK:
        code = tl.load(scales + block, mask=keep, other=0).to(tl.int32)
        outer = tl.load(nested_scales + block // NESTED_BLOCK, mask=keep, other=0.0)
        scale = tl.load(nested_table + code) * outer + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=keep, other=0.0)
    return scale


def arguments_of(weight: CodedWeight) -> tuple[Tensor, ...]:
    """A weight's tensors, as the kernels take them; where there is none, one that is not read."""
    elements, device = weight.rows * weight.columns, weight.codes.device
    block, nested_block = weight.block, weight.nested_block
    check_block(block)
    check_tensor("codes", weight.codes, torch.uint8, elements if weight.table is None else (elements + 1) // 2, device)
    table = weight.codes if weight.table is None else weight.table
    if weight.table is not None:
        check_tensor("table", table, torch.float32, 16, device)
    blocks = -(-elements // block)
    if weight.nested_table is None or weight.nested_scales is None or weight.offset is None:
        check_tensor("scales", weight.scales, torch.float32, blocks, device)
        return weight.codes, table, weight.scales, weight.scales, weight.scales, weight.scales
    if nested_block < 1 or nested_block & (nested_block - 1):
        raise ValueError(f"A block of scales is a power of two, not {nested_block}.")
    check_tensor("scales", weight.scales, torch.uint8, blocks, device)
    check_tensor("nested_table", weight.nested_table, torch.float32, 256, device)
    check_tensor("nested_scales", weight.nested_scales, torch.float32, -(-blocks // nested_block), device)
    check_tensor("offset", weight.offset, torch.float32, 1, device)
    return weight.codes, table, weight.scales, weight.nested_table, weight.nested_scales, weight.offset


def constants_of(weight: CodedWeight) -> dict[str, Any]:
    """How it is stored: what a kernel is compiled for."""
    nested = weight.nested_table is not None
    return {
        "FOUR": weight.table is not None, "BLOCK": weight.block, "NESTED_BLOCK": weight.nested_block if nested else 0,
    }  # fmt: skip


def check_block(block: int) -> None:
    if block < 32 or block % 32:
        raise ValueError(f"A block is a multiple of 32 elements, not {block}.")
