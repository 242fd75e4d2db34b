"""The operations in plain PyTorch: the definition, on any device, that every other implementation equals.

A weight in 4 bits is ``codes``, two a byte and the first in the high half; a ``table`` (16,) fp32 of what they stand
for; and a scale for each ``block`` of elements in row-major order, a multiple of 32, which runs on over row ends.
``scales`` are fp32 (blocks,), or nested: uint8 (blocks,) with ``nested_table`` (256,), ``nested_scales``
(⌈blocks / nested_block⌉,) and ``offset`` (), all fp32. A weight of int8 storage has a code a byte, which stands for
(code − 127) / 127, and no table; quantise8, dequantise8 and product8 are for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.dense import linear

name = "reference"

GROUP = 32  # columns of x in 8 bits that share a scale
_PANEL = 2**18  # weights expanded at once by the product: 1 MB in fp32
_ROWS = 1024  # of a weight, rounded to 8 bits at once


def quantise4(weight: Tensor, boundaries: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 (⌈n / 2⌉,) and absmax fp32 (blocks,) of ``weight`` (n,) fp32; an odd tail is padded with 0.0.

    An element's interval is the number of ``boundaries`` (15,), fp32 ascending, below x · (1 / absmax), so that a tie
    goes to the lower one; its code is ``order[interval]``, uint8 (16,). A block's NaN or infinity is in its absmax; its
    codes then mean nothing.
    """
    scaled, absmax = _scaled(weight, block)
    codes = order[torch.bucketize(scaled[: weight.numel() + weight.numel() % 2], boundaries, out_int32=True)]
    return (codes[0::2] << 4) | codes[1::2], absmax


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


def nearest8(values: Tensor, boundaries: Tensor) -> Tensor:
    """How many of the ascending ``boundaries`` (255,) lie below each of ``values`` (n,), both fp32 and finite: uint8
    (n,), the nearest of 256 ascending values where the boundaries are the middles between them."""
    return torch.bucketize(values, boundaries, out_int32=True).to(torch.uint8)


def dequantise4(
    codes: Tensor, table: Tensor, scales: Tensor, nested_table: Tensor | None, nested_scales: Tensor | None,
    offset: Tensor | None, block: int, nested_block: int, first: int, out: Tensor,
) -> None:  # fmt: skip
    """Rows ``first`` and on of a weight into ``out`` (rows, columns): table · scale in fp32, rounded to out's type."""
    start, stop = first * out.shape[1], first * out.shape[1] + out.numel()
    packed = codes[start // 2 : (stop + 1) // 2]
    both = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)
    values = table[both[start % 2 : start % 2 + stop - start].int()]
    _times_scales(values, scales, nested_table, nested_scales, offset, block, nested_block, start)
    out.copy_(values.view(out.shape))


def dequantise8(
    codes: Tensor, scales: Tensor, nested_table: Tensor | None, nested_scales: Tensor | None, offset: Tensor | None,
    block: int, nested_block: int, first: int, out: Tensor,
) -> None:  # fmt: skip
    """dequantise4 of int8."""
    start = first * out.shape[1]
    # By a tensor, because torch may turn x / 127 into x · (1 / 127).
    values = (codes[start : start + out.numel()].float() - 127).div_(codes.new_tensor(127.0, dtype=torch.float32))
    _times_scales(values, scales, nested_table, nested_scales, offset, block, nested_block, start)
    out.copy_(values.view(out.shape))


def _times_scales(
    values: Tensor, scales: Tensor, nested_table: Tensor | None, nested_scales: Tensor | None, offset: Tensor | None,
    block: int, nested_block: int, start: int,
) -> None:  # fmt: skip
    """Multiply ``values`` (n,), the elements from ``start`` on, by the scales of their blocks."""
    stop = start + values.numel()
    blocks = slice(start // block, (stop + block - 1) // block)
    by_block = scales[blocks]
    if nested_table is not None and nested_scales is not None and offset is not None:
        nested = nested_scales[torch.arange(blocks.start, blocks.stop, device=values.device) // nested_block]
        by_block = nested_table[by_block.int()] * nested + offset
    skip = start - blocks.start * block
    values *= by_block.repeat_interleave(block)[skip : skip + stop - start]


def product4(
    x: Tensor, codes: Tensor, table: Tensor, scales: Tensor, nested_table: Tensor | None, nested_scales: Tensor | None,
    offset: Tensor | None, block: int, nested_block: int, rows: int,
) -> Tensor:  # fmt: skip
    """A new x Wᵀ (tokens, rows) of ``x`` (tokens, columns), both fp32; a panel of W at a time."""
    weight = (codes, table, scales, nested_table, nested_scales, offset, block, nested_block)
    return _product(x, partial(dequantise4, *weight), rows)


def product8(
    x: Tensor, codes: Tensor, scales: Tensor, nested_table: Tensor | None, nested_scales: Tensor | None,
    offset: Tensor | None, block: int, nested_block: int, rows: int,
) -> Tensor:  # fmt: skip
    """product4 of int8."""
    weight = (codes, scales, nested_table, nested_scales, offset, block, nested_block)
    return _product(x, partial(dequantise8, *weight), rows)


def _product(x: Tensor, dequantise: Callable[[int, Tensor], None], rows: int) -> Tensor:
    y = x.new_empty(x.shape[0], rows)
    height = max(1, _PANEL // max(1, x.shape[1]))
    for first in range(0, rows, height):
        panel = x.new_empty(min(height, rows - first), x.shape[1])
        dequantise(first, panel)
        y[:, first : first + height] = x @ panel.t()
    return y


def product4_int8(
    x: Tensor, codes: Tensor, levels: Tensor, step: float, scales: Tensor, nested_table: Tensor | None,
    nested_scales: Tensor | None, offset: Tensor | None, block: int, nested_block: int, rows: int,
) -> Tensor:  # fmt: skip
    """product4 with x and the table in 8 bits: the table is step · ``levels``, int8 (16,) from −127 to 127, and x
    `in_8_bits`. Columns are a multiple of 32, so that each group lies within one block of the weight: what is summed
    within it are integers."""
    return product4(
        in_8_bits(x), codes, levels.float() * step, scales, nested_table, nested_scales, offset, block, nested_block,
        rows,
    )  # fmt: skip


def prepared_int8(*weight_rows_columns: Any) -> Callable[[Tensor], Tensor]:
    """product4_int8 of one weight: x (tokens, columns) → (tokens, rows)."""
    return lambda x: product4_int8(x, *weight_rows_columns[:-1])


def product8_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x (tokens, columns), in 8 bits, times the weight that `rows_in_8_bits` made ``codes`` and ``scales`` of →
    (tokens, rows)."""
    return torch.nn.functional.linear(in_8_bits(x), unpacked8(codes, scales, x.shape[1]))


def rows_in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` (rows, columns), fp32, in integers of −127 … 127 times a scale for each row: codes, uint8
    (rows, 2, stride8(columns)), the integers plus 128, even and odd columns apart; and scales, fp32 (rows,)."""
    rows, columns = weight.shape
    codes = torch.full((rows, 2, stride8(columns)), 128, dtype=torch.uint8)
    scales = torch.empty(rows)
    for first in range(0, rows, _ROWS):
        part = slice(first, first + _ROWS)
        scales[part] = weight[part].abs().amax(dim=1).clamp(min=1e-35) / 127
        found = (weight[part] / scales[part, None]).round_().add_(128).to(torch.uint8)
        codes[part, :, : columns // 2] = found.view(len(found), -1, 2).transpose(1, 2)
    return codes, scales


def unpacked8(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """The weight (rows, columns) that codes and scales of `rows_in_8_bits` stand for."""
    apart = codes[:, :, : columns // 2].float() - 128
    return apart.transpose(1, 2).reshape(len(codes), columns) * scales[:, None]


def stride8(columns: int) -> int:
    """The even columns of a row, and zeros up to a multiple of 64."""
    return -(-columns // 128) * 64


def in_8_bits(x: Tensor) -> Tensor:
    """``x`` (tokens, columns) fp32 with each group of 32 columns rounded to integers of −127 … 127 times its scale,
    absmax / 127; a group with a NaN or infinity becomes NaN."""
    groups = x.reshape(-1, GROUP)
    absmax = groups.abs().amax(dim=1, keepdim=True)
    absmax = torch.where(absmax.isfinite(), absmax.clamp(min=1e-35), torch.nan)
    largest = absmax.new_tensor(127)  # a tensor, because torch turns 127 / absmax into 127 · (1 / absmax)
    return ((groups * (largest / absmax)).round() * (absmax / 127)).view(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight · x / √(mean(x²) + eps) over the last dimension of x (…, dim), normed in fp32 at least and rounded to x's
    type before ``weight`` (dim,) multiplies it (Zhang & Sennrich, 2019, arXiv:1910.07467, equation 4); and the
    reciprocal of each row's root (…, 1)."""
    exact = _exact(x)
    inverse = exact.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (exact * inverse).to(x.dtype).mul_(weight), inverse


def rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """The gradient (…, dim) of x. With n = x · inverse and g = grad · weight:  dx = inverse · (g − n · mean(g · n))."""
    exact = _exact(x)
    g = _exact(grad * weight)
    along = (g * exact).mean(-1, keepdim=True).mul_(inverse).mul_(inverse)
    return g.addcmul_(exact, along, value=-1).mul_(inverse).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of one shape (Shazeer, 2020, arXiv:2002.05202, equation 5)."""
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad_up = torch.nn.functional.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate), grad_up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, of one shape, GELU being its approximation by tanh (arXiv:2002.05202, equation 5)."""
    return torch.nn.functional.gelu(gate, approximate="tanh").mul_(up)


def geglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad_up = torch.nn.functional.gelu(gate, approximate="tanh").mul_(grad)
    return torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"), grad_up


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool) -> Tensor:
    """x (batch, heads, tokens, dim) rotated by the angles of the positions (Su et al., 2021, arXiv:2104.09864): cosines
    and sines (batch or 1, tokens, dim), halves apart as transformers lays them out; a new tensor laid out as (batch,
    tokens, heads, dim). ``transposed``: by the transposed matrix, which takes gradients back."""
    a, b = x.transpose(1, 2).chunk(2, dim=-1)
    (c0, c1), (s0, s1) = (table.unsqueeze(2).chunk(2, dim=-1) for table in (cosines, sines))
    halves = (a * c0 + b * s1, b * c1 - a * s0) if transposed else (a * c0 - b * s0, b * c1 + a * s1)
    return torch.cat(halves, dim=-1).transpose(1, 2)


def update_product(x: Tensor, A: Tensor, B: Tensor, scale: float, y: Tensor) -> Tensor:
    """A low-rank update of x (n, in) by A (rank, in) and B (out, rank): x Aᵀ (n, rank), and ``y`` (n, out) gets scale
    times its product with Bᵀ added (Hu et al., 2021, arXiv:2106.09685, equation 3)."""
    low = linear(x, A.to(x.dtype))
    y.addmm_(low, B.to(x.dtype).t(), alpha=scale)
    return low


def update_product_backward(
    grad: Tensor, x: Tensor, low: Tensor, A: Tensor, B: Tensor, scale: float, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of A and B from that of the output, ``grad`` (n, out), and from ``low``, which the update gave; the
    gradient of x is added to ``grad_x`` (n, in)."""
    grad_low = linear(grad, B.to(grad.dtype).t()).mul_(scale)
    grad_A = linear(grad_low.t(), x.t()).to(A.dtype)
    grad_B = linear(low.t(), grad.t()).mul_(scale).t().to(B.dtype)
    if grad_x is not None:
        grad_x.addmm_(grad_low, A.to(grad.dtype))
    return grad_A, grad_B


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
