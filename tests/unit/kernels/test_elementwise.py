"""The hand-written passes against the plain formulas: values to the last bit, gradients by gradcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from veneer.kernels.elementwise import rms_norm, swiglu

pytestmark = pytest.mark.unit


def _plain_norm(x, weight, eps):
    exact = x.float() if x.dtype == torch.bfloat16 else x
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_are_the_plain_formulas_to_the_last_bit(dtype):
    torch.manual_seed(0)
    gate, up = torch.randn(2, 3, 5, 16).to(dtype)
    weight = torch.rand(16).to(dtype)
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)
    assert torch.equal(rms_norm(gate, weight, 1e-5), _plain_norm(gate, weight, 1e-5))


def test_gradients_by_gradcheck():
    torch.manual_seed(0)
    x, y = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(swiglu, (x, y))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (x,))


def test_gradients_in_half_precision_are_the_plain_ones():
    torch.manual_seed(0)
    weight, grad = torch.rand(64).bfloat16(), torch.randn(7, 64).bfloat16()
    found = []
    for norm, gated in ((rms_norm, swiglu), (_plain_norm, lambda gate, up: F.silu(gate) * up)):
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        found.append(torch.autograd.grad(norm(x, weight, 1e-5) + gated(x, x * 2), x, grad)[0])
    torch.testing.assert_close(*found)


def test_only_the_inputs_are_kept():
    saved = []
    gate, up = torch.randn(2, 8, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        swiglu(gate, up)
        rms_norm(gate, torch.ones(32), 1e-5)
    assert saved == [8 * 32, 8 * 32, 8 * 32, 8, 32]
