"""RMSNorm and its gradient: a row a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.operations import norm
from veneer.kernels.triton.launch import LONGEST_ROW, check_shape, power_of_two, served, warps


@triton.jit
def rms_norm_rows(x, weight, y, inverse, dim, eps, ONCE: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    keep = column < dim
    value = tl.load(x + row * dim + column, mask=keep, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
    normed = value * root
    if not ONCE:
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + row * dim + column, (normed * factor).to(y.dtype.element_ty), mask=keep)
    tl.store(inverse + row, root)


@triton.jit
def rms_norm_gradient(grad, x, inverse, weight, out, dim, ONCE: tl.constexpr, WIDTH: tl.constexpr):
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
    tl.store(out + row * dim + column, ((g - value * along) * root).to(out.dtype.element_ty), mask=keep)


def rms_norm(x: Tensor, weight: Tensor, eps: float, once: bool) -> tuple[Tensor, Tensor]:
    if not _fits(x, weight):
        return norm.rms_norm.definition(x, weight, eps, once)
    x, weight = x.contiguous(), weight.contiguous()
    dim = x.shape[-1]
    check_shape("weight", weight, x, (dim,))
    y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    width = power_of_two(dim)
    rms_norm_rows[(inverse.numel(),)](
        x, weight, y, inverse, dim, eps, ONCE=once, WIDTH=width, num_warps=warps(width)
    )  # fmt: skip
    return y, inverse


def rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, once: bool) -> Tensor:
    if not (_fits(x, weight) and grad.dtype is x.dtype and inverse.dtype is torch.float32):
        return norm.rms_norm_backward.definition(grad, x, inverse, weight, once)
    grad, x, inverse, weight = (tensor.contiguous() for tensor in (grad, x, inverse, weight))
    dim = x.shape[-1]
    check_shape("grad", grad, x, tuple(x.shape))
    check_shape("inverse", inverse, x, (*x.shape[:-1], 1))
    check_shape("weight", weight, x, (dim,))
    out, width = torch.empty_like(x), power_of_two(dim)
    rms_norm_gradient[(inverse.numel(),)](
        grad, x, inverse, weight, out, dim, ONCE=once, WIDTH=width, num_warps=warps(width)
    )  # fmt: skip
    return out


def _fits(x: Tensor, weight: Tensor) -> bool:
    return served(x) and served(weight) and x.shape[-1] <= LONGEST_ROW
