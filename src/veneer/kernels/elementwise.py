"""The passes between a transformer's matrix products, forward and backward by hand.

Autograd keeps every intermediate of a formula; these keep its inputs and compute the rest again. Defined in
reference.py, with the papers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.operations import gates, norm, rotation


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of one shape (Shazeer, 2020, arXiv:2002.05202, equation 5); saves gate and up."""
    y: Tensor = _Gated.apply(gate, up, gates.swiglu, gates.swiglu_backward)  # type: ignore[no-untyped-call]
    return y


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, of one shape, with GELU's approximation by tanh (arXiv:2002.05202, equation 5); saves gate and
    up."""
    y: Tensor = _Gated.apply(gate, up, gates.geglu, gates.geglu_backward)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension of x (…, dim), normed in fp32 at least and rounded to x's
    type before the frozen ``weight`` (dim,) multiplies it (Zhang & Sennrich, 2019, arXiv:1910.07467, equation 4); saves
    x and one number a row."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x (batch, heads, tokens, dim) rotated by the angles of the positions (Su et al., 2021, arXiv:2104.09864), cosines
    and sines (batch or 1, tokens, dim); saves these alone."""
    y: Tensor = _Rotate.apply(x, cosines, sines)  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, product: Any, gradients: Any) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(gate, up)
        y: Tensor = product(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_gate, grad_up = ctx.gradients(grad, *ctx.saved_tensors)
        return grad_gate, grad_up, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y: Tensor
        y, inverse = norm.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, inverse, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return norm.rms_norm_backward(grad, *ctx.saved_tensors), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        y: Tensor = rotation.rotate(x, cosines, sines, False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return rotation.rotate(grad, *ctx.saved_tensors, True), None, None
