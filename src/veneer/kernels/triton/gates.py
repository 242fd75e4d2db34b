"""SwiGLU, GeGLU and their gradients: element by element, so a result may take the place of what it is made of."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.operations import gates
from veneer.kernels.triton.launch import check_like, kernels_take

_WIDTH = 1024
_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 √(2 / π): (1 + tanh z) / 2 is the logistic function of 2 z
_CUBE = tl.constexpr(0.044715)


@triton.jit
def gate_activation(gate, GELU: tl.constexpr):
    """silu or gelu of ``gate``, and its derivative."""
    if GELU:
        share = tl.sigmoid((gate + gate * gate * gate * _CUBE) * _TANH_SCALE)
        slope = (gate * gate * _CUBE * 3.0 + 1.0) * _TANH_SCALE
    else:
        share = tl.sigmoid(gate)
        slope = 1.0
    return gate * share, share * (1.0 + gate * (1.0 - share) * slope)


@triton.jit
def gated(gate, up, y, elements, GELU: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    keep = place < elements
    active, _ = gate_activation(tl.load(gate + place, mask=keep, other=0.0).to(tl.float32), GELU)
    active = active.to(y.dtype.element_ty).to(tl.float32)
    factor = tl.load(up + place, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + place, (active * factor).to(y.dtype.element_ty), mask=keep)


@triton.jit
def gated_gradient(grad, gate, up, grad_gate, grad_up, elements, GELU: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    keep = place < elements
    g = tl.load(grad + place, mask=keep, other=0.0).to(tl.float32)
    factor = tl.load(up + place, mask=keep, other=0.0).to(tl.float32)
    active, derivative = gate_activation(tl.load(gate + place, mask=keep, other=0.0).to(tl.float32), GELU)
    active = active.to(grad_up.dtype.element_ty).to(tl.float32)
    inner = (g * factor).to(grad_gate.dtype.element_ty).to(tl.float32)
    tl.store(grad_up + place, (active * g).to(grad_up.dtype.element_ty), mask=keep)
    tl.store(grad_gate + place, (inner * derivative).to(grad_gate.dtype.element_ty), mask=keep)


def triton_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _gated(gate, up, False) if kernels_take(gate, up) else gates.swiglu.definition(gate, up)


def triton_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return _gated(gate, up, True) if kernels_take(gate, up) else gates.geglu.definition(gate, up)


def triton_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if not kernels_take(grad, gate, up):
        return gates.swiglu_backward.definition(grad, gate, up)
    return _gradient(grad, gate, up, False)


def triton_geglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if not kernels_take(grad, gate, up):
        return gates.geglu_backward.definition(grad, gate, up)
    return _gradient(grad, gate, up, True)


def _gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    check_like("up", up, gate, tuple(gate.shape))
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    gated[(triton.cdiv(gate.numel(), _WIDTH),)](gate, up, y, gate.numel(), GELU=gelu, WIDTH=_WIDTH)
    return y


def _gradient(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    check_like("up", up, gate, tuple(gate.shape))
    check_like("grad", grad, gate, tuple(gate.shape))
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    gated_gradient[(triton.cdiv(gate.numel(), _WIDTH),)](
        grad, gate, up, grad_gate, grad_up, gate.numel(), GELU=gelu, WIDTH=_WIDTH
    )
    return grad_gate, grad_up
