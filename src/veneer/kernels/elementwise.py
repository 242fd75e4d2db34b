"""The passes between a transformer's matrix products, forward and backward by hand.

Autograd keeps every intermediate of a formula; these keep its inputs and compute the rest again, in place. The forward
results are those of the plain formula to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor, room: Callable[[Tensor], Tensor] = torch.empty_like) -> Tensor:
    """silu(gate) · up, of one shape (Shazeer, 2020, arXiv:2002.05202, equation 5); saves gate and up.

    ``room`` gives the memory for it, like the gate's.
    """
    y: Tensor = _SwiGLU.apply(gate, up, room)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension of x (…, dim), normed in fp32 at least and rounded to x's
    type before the frozen ``weight`` (dim,) multiplies it (Zhang & Sennrich, 2019, arXiv:1910.07467, equation 4); saves
    x and one number a row."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, room: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        y: Tensor = torch.ops.aten.silu.out(gate, out=room(gate))
        return y.mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = _exact(x)
        inverse = exact.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return (exact * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        exact = _exact(x)
        # With n = x · inverse and g = grad · weight:  dx = inverse · (g − n · mean(g · n)).
        g = _exact(grad * weight)
        along = (g * exact).mean(-1, keepdim=True).mul_(inverse).mul_(inverse)
        return g.addcmul_(exact, along, value=-1).mul_(inverse).to(x.dtype), None, None


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
