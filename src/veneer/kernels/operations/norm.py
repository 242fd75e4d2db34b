"""RMSNorm and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.operation import operation


def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float, once: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=dtype)


@operation("(Tensor x, Tensor weight, float eps, bool once) -> (Tensor, Tensor)", fake=_fake_rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float, once: bool) -> tuple[Tensor, Tensor]:
    """weight · x / √(mean(x²) + eps) over the last dimension of x (…, dim), normed in fp32 at least and rounded to x's
    type before ``weight`` (dim,) multiplies it (Zhang & Sennrich, 2019, arXiv:1910.07467, equation 4), or where
    ``once`` is true only after; and the reciprocal of each row's root (…, 1)."""
    exact = _exact(x)
    inverse = exact.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = exact * inverse
    return (normed if once else normed.to(x.dtype)).mul_(weight).to(x.dtype), inverse


def _fake_rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, once: bool) -> Tensor:
    return torch.empty_like(x)


@operation(
    "(Tensor grad, Tensor x, Tensor inverse, Tensor weight, bool once) -> Tensor", fake=_fake_rms_norm_backward
)  # fmt: skip
def rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, once: bool) -> Tensor:
    """The gradient (…, dim) of x. With n = x · inverse and g = grad · weight:  dx = inverse · (g − n · mean(g · n)),
    where g is rounded to x's type unless ``once`` is true."""
    exact = _exact(x)
    g = _exact(grad) * weight if once else _exact((grad * weight).to(x.dtype))
    along = (g * exact).mean(-1, keepdim=True).mul_(inverse).mul_(inverse)
    return g.addcmul_(exact, along, value=-1).mul_(inverse).to(x.dtype)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def differentiable_rms_norm(x: Tensor, weight: Tensor, eps: float, once: bool = False) -> Tensor:
    """`rms_norm` of x (…, dim) by the frozen ``weight`` (dim,), differentiable in x; saves x and one number a row."""
    y: Tensor = _RMSNorm.apply(x, weight, eps, once)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, once: bool) -> Tensor:
        y, inverse = rms_norm(x, weight, eps, once)
        ctx.once = once
        ctx.save_for_backward(x, inverse, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        return rms_norm_backward(grad, x, inverse, weight, ctx.once), None, None, None
