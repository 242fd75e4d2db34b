"""SwiGLU, GeGLU and their gradients.

Autograd keeps every intermediate of a formula; the functions here keep its inputs and recompute the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.operation import operation

_FORWARD = "(Tensor gate, Tensor up) -> Tensor"
_BACKWARD = "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)"


def _fake_gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


def _fake_gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


@operation(_FORWARD, fake=_fake_gated)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of one shape (Shazeer, 2020, arXiv:2002.05202, equation 5)."""
    return torch.nn.functional.silu(gate).mul_(up)


@operation(_BACKWARD, fake=_fake_gated_backward)
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad_up = torch.nn.functional.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad * up, gate), grad_up


@operation(_FORWARD, fake=_fake_gated)
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, of one shape, GELU being its approximation by tanh (arXiv:2002.05202, equation 5)."""
    return torch.nn.functional.gelu(gate, approximate="tanh").mul_(up)


@operation(_BACKWARD, fake=_fake_gated_backward)
def geglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad_up = torch.nn.functional.gelu(gate, approximate="tanh").mul_(grad)
    return torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"), grad_up


def differentiable_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu`, differentiable in both; saves gate and up."""
    y: Tensor = _Gated.apply(gate, up, swiglu, swiglu_backward)  # type: ignore[no-untyped-call]
    return y


def differentiable_geglu(gate: Tensor, up: Tensor) -> Tensor:
    """`geglu`, differentiable in both; saves gate and up."""
    y: Tensor = _Gated.apply(gate, up, geglu, geglu_backward)  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, product: Callable[[Tensor, Tensor], Tensor],
        gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        ctx.gradients = gradients
        ctx.save_for_backward(gate, up)
        return product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_gate, grad_up = ctx.gradients(grad, *ctx.saved_tensors)
        return grad_gate, grad_up, None, None
