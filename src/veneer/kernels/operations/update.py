"""The products of a low-rank update, added into what the frozen weight gave. Their autograd function, which has that
weight's product too, is in updates/product.py."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.dense import linear
from veneer.kernels.operation import operation


def _fake_update_product(x: Tensor, A: Tensor, B: Tensor, scale: float, y: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[0])


@operation("(Tensor x, Tensor A, Tensor B, float scale, Tensor(a!) y) -> Tensor", fake=_fake_update_product)
def update_product(x: Tensor, A: Tensor, B: Tensor, scale: float, y: Tensor) -> Tensor:
    """A low-rank update of x (n, in) by A (rank, in) and B (out, rank): x Aᵀ (n, rank), and ``y`` (n, out) gets scale
    times its product with Bᵀ added (Hu et al., 2021, arXiv:2106.09685, equation 3)."""
    low = linear(x, A.to(x.dtype))
    y.addmm_(low, B.to(x.dtype).t(), alpha=scale)
    return low


def _fake_update_product_backward(
    grad: Tensor, x: Tensor, low: Tensor, A: Tensor, B: Tensor, scale: float, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(A), torch.empty_like(B)


@operation(
    "(Tensor grad, Tensor x, Tensor low, Tensor A, Tensor B, float scale, Tensor(a!)? grad_x) -> (Tensor, Tensor)",
    fake=_fake_update_product_backward,
)
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
