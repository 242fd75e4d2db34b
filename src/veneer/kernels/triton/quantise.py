"""Weights to codes and scales, and the nearest of 256 values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.triton.coded import check_block
from veneer.kernels.triton.launch import EXACT, check_tensor, power_of_two

_TILE = 2048  # elements of a program
_NEAREST = 1024  # likewise; of more, it needs more registers than sm_100 has


@triton.jit
def below(values, boundaries, COUNT: tl.constexpr, BITS: tl.constexpr):
    """How many of COUNT ascending boundaries are below each value, found by halves; COUNT has so many BITS."""
    count = tl.zeros_like(values).to(tl.int32)
    for bit in tl.static_range(BITS):
        reached = count + (1 << (BITS - 1 - bit))
        inside = reached <= COUNT
        boundary = tl.load(boundaries + reached - 1, mask=inside, other=0.0)
        count = tl.where(inside & (boundary < values), reached, count)
    return count


@triton.jit
def largest_of(values):
    """The largest absolute value of each row. Their bits, as integers, are in the order of the numbers, and a NaN is
    above all: a maximum of floats leaves it out on a GPU."""
    return tl.max(tl.abs(values).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)


@triton.jit
def factor_of(absmax):
    """Multiplied by, as bitsandbytes does it: dividing would round some codes the other way."""
    least = tl.full(absmax.shape, 1e-38, tl.float32)  # a plain 1e-38, which is subnormal, would be fp64
    return tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.maximum(absmax, least))


@triton.jit
def quantise_4_bits(
    weight, boundaries, order, codes, scales, elements, blocks,
    BLOCK: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    pair = tl.arange(0, HALF)[None, :]
    inside = (2 * pair < BLOCK) & (block < blocks)[:, None]
    place = block[:, None] * BLOCK + 2 * pair
    left = tl.load(weight + place, mask=inside & (place < elements), other=0.0)
    right = tl.load(weight + place + 1, mask=inside & (place + 1 < elements), other=0.0)
    bits = tl.maximum(tl.abs(left).to(tl.int32, bitcast=True), tl.abs(right).to(tl.int32, bitcast=True))
    absmax = tl.max(bits, 1).to(tl.float32, bitcast=True)  # see largest_of
    factor = factor_of(absmax)[:, None]
    high = tl.load(order + below(left * factor, boundaries, 15, 4))
    low = tl.load(order + below(right * factor, boundaries, 15, 4))
    tl.store(codes + place // 2, (high << 4) | low, mask=inside & (place < elements))
    tl.store(scales + block, absmax, mask=block < blocks)


@triton.jit
def quantise_8_bits(
    weight, boundaries, codes, scales, elements, blocks,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.arange(0, WIDTH)[None, :]
    place = block[:, None] * BLOCK + column
    inside = (column < BLOCK) & (place < elements)
    values = tl.load(weight + place, mask=inside, other=0.0)
    absmax = largest_of(values)
    code = below(values * factor_of(absmax)[:, None], boundaries, 254, 8)
    tl.store(codes + place, code.to(tl.uint8), mask=inside)
    tl.store(scales + block, absmax, mask=block < blocks)


@triton.jit
def nearest_code(values, boundaries, codes, elements, WIDTH: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    keep = place < elements
    code = below(tl.load(values + place, mask=keep, other=0.0), boundaries, 255, 8)
    tl.store(codes + place, code.to(tl.uint8), mask=keep)


def triton_quantise4(weight: Tensor, boundaries: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    _check(weight, boundaries, 15, block)
    check_tensor("order", order, torch.uint8, 16, weight.device)
    elements = weight.numel()
    codes, absmax = _room(weight, (elements + 1) // 2, block)
    if elements:
        blocks = max(1, _TILE // power_of_two(block))
        quantise_4_bits[(triton.cdiv(len(absmax), blocks),)](
            weight, boundaries, order, codes, absmax, elements, len(absmax),
            BLOCK=block, HALF=power_of_two(block) // 2, BLOCKS=blocks, **EXACT,
        )  # fmt: skip
    return codes, absmax


def triton_quantise8(weight: Tensor, boundaries: Tensor, block: int) -> tuple[Tensor, Tensor]:
    _check(weight, boundaries, 254, block)
    codes, absmax = _room(weight, weight.numel(), block)
    if weight.numel():
        blocks = max(1, _TILE // power_of_two(block))
        quantise_8_bits[(triton.cdiv(len(absmax), blocks),)](
            weight, boundaries, codes, absmax, weight.numel(), len(absmax),
            BLOCK=block, WIDTH=power_of_two(block), BLOCKS=blocks, **EXACT,
        )  # fmt: skip
    return codes, absmax


def triton_nearest8(values: Tensor, boundaries: Tensor) -> Tensor:
    check_tensor("values", values, torch.float32, 0, values.device)
    check_tensor("boundaries", boundaries, torch.float32, 255, values.device)
    codes = torch.empty_like(values, dtype=torch.uint8)
    if values.numel():
        nearest_code[(triton.cdiv(values.numel(), _NEAREST),)](
            values, boundaries, codes, values.numel(), WIDTH=_NEAREST
        )
    return codes


def _check(weight: Tensor, boundaries: Tensor, count: int, block: int) -> None:
    check_tensor("weight", weight, torch.float32, 0, weight.device)
    check_tensor("boundaries", boundaries, torch.float32, count, weight.device)
    check_block(block)


def _room(weight: Tensor, codes: int, block: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty(codes, dtype=torch.uint8), weight.new_empty(-(-weight.numel() // block))
