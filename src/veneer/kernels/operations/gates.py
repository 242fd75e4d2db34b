"""SwiGLU, GeGLU and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

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
