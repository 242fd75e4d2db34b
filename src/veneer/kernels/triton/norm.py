"""RMSNorm and its gradient, with the sum that is normed or without: a row a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.operations import norm, residual_norm
from veneer.kernels.triton.launch import LONGEST_ROW, check_like, kernels_take, power_of_two, warps


@triton.jit
def rms_norm_rows(
    x, residual, weight, total, y, inverse, dim, eps, ADDS: tl.constexpr, ONCE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    keep = column < dim
    value = tl.load(x + row * dim + column, mask=keep, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(residual + row * dim + column, mask=keep, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * dim + column, rounded, mask=keep)
        value = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
    normed = value * root
    if not ONCE:
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + row * dim + column, (normed * factor).to(y.dtype.element_ty), mask=keep)
    tl.store(inverse + row, root)


@triton.jit
def rms_norm_gradient(
    grad, beside, x, inverse, weight, out, dim, ADDS: tl.constexpr, ONCE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    keep = column < dim
    value = tl.load(x + row * dim + column, mask=keep, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=keep, other=0.0).to(tl.float32)
    g = tl.load(grad + row * dim + column, mask=keep, other=0.0).to(tl.float32) * factor
    if not ONCE:
        g = g.to(out.dtype.element_ty).to(tl.float32)
    root = tl.load(inverse + row)
    along = tl.sum(g * value, 0) / dim * root * root
    slope = ((g - value * along) * root).to(out.dtype.element_ty)
    if ADDS:
        other = tl.load(beside + row * dim + column, mask=keep, other=0.0).to(tl.float32)
        slope = (slope.to(tl.float32) + other).to(out.dtype.element_ty)
    tl.store(out + row * dim + column, slope, mask=keep)


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float, once: bool) -> tuple[Tensor, Tensor]:
    if not _fits(x, weight):
        return norm.rms_norm.definition(x, weight, eps, once)
    _, y, inverse = _normed(x, None, weight, eps, once)
    return y, inverse


def triton_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, once: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not (_fits(x, weight) and residual.dtype is x.dtype):
        return residual_norm.add_rms_norm.definition(x, residual, weight, eps, once)
    return _normed(x, residual, weight, eps, once)


def triton_rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, once: bool) -> Tensor:
    if not (_fits(x, weight) and grad.dtype is x.dtype and inverse.dtype is torch.float32):
        return norm.rms_norm_backward.definition(grad, x, inverse, weight, once)
    return _gradient(grad, None, x, inverse, weight, once)


def triton_add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, inverse: Tensor, weight: Tensor, once: bool
) -> Tensor:
    if not (_fits(total, weight) and kernels_take(total, grad, grad_total) and inverse.dtype is torch.float32):
        return residual_norm.add_rms_norm_backward.definition(grad, grad_total, total, inverse, weight, once)
    return _gradient(grad, grad_total, total, inverse, weight, once)


def _normed(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, once: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum, or x itself where nothing is added; the normed; the reciprocal roots."""
    x, weight, dim = x.contiguous(), weight.contiguous(), x.shape[-1]
    check_like("weight", weight, x, (dim,))
    y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    total = x if residual is None else torch.empty_like(x)
    beside = x if residual is None else residual.contiguous()
    check_like("residual", beside, x, tuple(x.shape))
    width = power_of_two(dim)
    rms_norm_rows[(inverse.numel(),)](
        x, beside, weight, total, y, inverse, dim, eps, ADDS=residual is not None, ONCE=once, WIDTH=width,
        num_warps=warps(width),
    )  # fmt: skip
    return total, y, inverse


def _gradient(
    grad: Tensor, beside: Tensor | None, x: Tensor, inverse: Tensor, weight: Tensor, once: bool
) -> Tensor:  # fmt: skip
    grad, x, inverse, weight = (tensor.contiguous() for tensor in (grad, x, inverse, weight))
    adds, beside, dim = beside is not None, grad if beside is None else beside.contiguous(), x.shape[-1]
    check_like("grad", grad, x, tuple(x.shape))
    check_like("the sum's gradient", beside, x, tuple(x.shape))
    check_like("inverse", inverse, x, (*x.shape[:-1], 1))
    check_like("weight", weight, x, (dim,))
    out, width = torch.empty_like(x), power_of_two(dim)
    rms_norm_gradient[(inverse.numel(),)](
        grad, beside, x, inverse, weight, out, dim, ADDS=adds, ONCE=once, WIDTH=width, num_warps=warps(width)
    )
    return out


def _fits(x: Tensor, weight: Tensor) -> bool:
    return kernels_take(x) and kernels_take(weight) and x.shape[-1] <= LONGEST_ROW
