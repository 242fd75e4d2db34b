"""A frozen weight and a low-rank update of it as one product in 16 bits: [x | x Aᵀ] · [W | s B]ᵀ, and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.coded import CodedWeight
from veneer.kernels.operation import operation
from veneer.kernels.operations.products import dequantise

_UPDATE = "Tensor? A, Tensor? B, float scale"
_FORWARD = "(Tensor x, {}, Tensor? bias, " + _UPDATE + ") -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor grad, {}, Tensor x, Tensor low, " + _UPDATE + ", bool wants_x, bool wants_update)"
    " -> (Tensor, Tensor, Tensor)"
)
_DENSE, _CODED = "Tensor weight", "{weight}"
Product = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def _fake_product_with_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float,
) -> Product:  # fmt: skip
    return x.new_empty(len(x), weight.shape[0]), x.new_empty(len(x), 0 if A is None else len(A))


@operation(_FORWARD.format(_DENSE), fake=_fake_product_with_update)
def product_with_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float,
) -> Product:  # fmt: skip
    """x (n, in) in 16 bits, weight (out, in) of any type → y = x Wᵀ + bias + scale · low Bᵀ (n, out), and low = x Aᵀ
    (n, rank), both in x's type. A (rank, in), B (out, rank) and bias (out,) fp32. Without A and B, low is (n, 0)."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if A is None or B is None:
        return y, x.new_empty(len(x), 0)
    low = F.linear(x, A.to(x.dtype))
    return y.addmm_(low, (scale * B).to(x.dtype).t()), low


def _fake_product_with_update_backward(
    grad: Tensor, weight: Tensor, x: Tensor, low: Tensor, A: Tensor | None, B: Tensor | None, scale: float,
    wants_x: bool, wants_update: bool,
) -> Gradients:  # fmt: skip
    return room_for_gradients(grad, weight.shape[1], A, B, wants_x, wants_update)


@operation(_BACKWARD.format(_DENSE), fake=_fake_product_with_update_backward)
def product_with_update_backward(
    grad: Tensor, weight: Tensor, x: Tensor, low: Tensor, A: Tensor | None, B: Tensor | None, scale: float,
    wants_x: bool, wants_update: bool,
) -> Gradients:  # fmt: skip
    """grad (n, out) → the gradients of x (n, in), in its type, and of A and B, fp32, each empty where it is not
    wanted."""
    grad_x, grad_A, grad_B = room_for_gradients(grad, weight.shape[1], A, B, wants_x, wants_update)
    if wants_x:
        torch.mm(grad, weight.to(grad.dtype), out=grad_x)
    if A is None or B is None:
        return grad_x, grad_A, grad_B
    grad_low = torch.mm(grad, (scale * B).to(grad.dtype))
    if wants_x:
        grad_x.addmm_(grad_low, A.to(grad.dtype))
    if wants_update:
        torch.mm(grad_low.float().t(), x.float(), out=grad_A)
        torch.mm(grad.float().t(), low.float() * scale, out=grad_B)
    return grad_x, grad_A, grad_B


def _fake_product_with_update_coded(
    x: Tensor, weight: CodedWeight, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float,
) -> Product:  # fmt: skip
    return x.new_empty(len(x), weight.rows), x.new_empty(len(x), 0 if A is None else len(A))


@operation(_FORWARD.format(_CODED), fake=_fake_product_with_update_coded)
def product_with_update_coded(
    x: Tensor, weight: CodedWeight, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float,
) -> Product:  # fmt: skip
    """`product_with_update` of a weight in codes."""
    return product_with_update.definition(x, _expanded(weight, x), bias, A, B, scale)


def _fake_product_with_update_coded_backward(
    grad: Tensor, weight: CodedWeight, x: Tensor, low: Tensor, A: Tensor | None, B: Tensor | None, scale: float,
    wants_x: bool, wants_update: bool,
) -> Gradients:  # fmt: skip
    return room_for_gradients(grad, weight.columns, A, B, wants_x, wants_update)


@operation(_BACKWARD.format(_CODED), fake=_fake_product_with_update_coded_backward)
def product_with_update_coded_backward(
    grad: Tensor, weight: CodedWeight, x: Tensor, low: Tensor, A: Tensor | None, B: Tensor | None, scale: float,
    wants_x: bool, wants_update: bool,
) -> Gradients:  # fmt: skip
    """`product_with_update_backward` of a weight in codes."""
    return product_with_update_backward.definition(
        grad, _expanded(weight, grad), x, low, A, B, scale, wants_x, wants_update
    )


def _expanded(weight: CodedWeight, like: Tensor) -> Tensor:
    out = like.new_empty(weight.rows, weight.columns)
    dequantise(weight, 0, out)
    return out


def room_for_gradients(
    grad: Tensor, into: int, A: Tensor | None, B: Tensor | None, wants_x: bool, wants_update: bool,
) -> Gradients:  # fmt: skip
    """Where they go: empty where they are not wanted."""
    none = grad.new_empty(0, dtype=torch.float32)
    updated = wants_update and A is not None and B is not None
    return (
        grad.new_empty(len(grad), into) if wants_x else grad.new_empty(0),
        torch.empty_like(A) if updated and A is not None else none,
        torch.empty_like(B) if updated and B is not None else none,
    )
