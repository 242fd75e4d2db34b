"""RMSNorm of a residual stream and what a layer adds to it, in one pass, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.operation import operation
from veneer.kernels.operations.norm import rms_norm, rms_norm_backward


def _fake_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, once: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=dtype)


@operation(
    "(Tensor x, Tensor residual, Tensor weight, float eps, bool once) -> (Tensor, Tensor, Tensor)",
    fake=_fake_add_rms_norm,
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, once: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x + residual, of one shape and type; and what `rms_norm` makes of the sum."""
    total = x + residual
    return total, *rms_norm.definition(total, weight, eps, once)


def _fake_add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, inverse: Tensor, weight: Tensor, once: bool
) -> Tensor:
    return torch.empty_like(total)


@operation(
    "(Tensor grad, Tensor grad_total, Tensor total, Tensor inverse, Tensor weight, bool once) -> Tensor",
    fake=_fake_add_rms_norm_backward,
)
def add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, inverse: Tensor, weight: Tensor, once: bool
) -> Tensor:
    """The gradient of x, and of the residual, which is the same: that of the normed sum, ``grad``, through the norm,
    and ``grad_total``, that of the sum itself."""
    return rms_norm_backward.definition(grad, total, inverse, weight, once).add_(grad_total)
