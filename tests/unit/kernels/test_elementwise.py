"""The hand-written passes against the plain formulas, and the C++ of them against both; gradients by gradcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from definitions import definitions
from veneer.kernels.backends import cpu
from veneer.kernels.extension import VARIANTS
from veneer.kernels.operations import gates, norm, rotation
from veneer.kernels.operations.gates import differentiable_geglu as geglu
from veneer.kernels.operations.gates import differentiable_swiglu as swiglu
from veneer.kernels.operations.norm import differentiable_rms_norm as rms_norm
from veneer.kernels.operations.rotation import differentiable_rotate as rotate

pytestmark = pytest.mark.unit
reference = definitions(gates, norm, rotation)
every_variant = pytest.mark.parametrize("kernels", [pytest.param(cpu.Cpu(name), id=name) for name in VARIANTS])


def _plain_norm(x, weight, eps):
    exact = x.float() if x.dtype == torch.bfloat16 else x
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_values_are_the_plain_formulas_to_the_last_bit_where_plain_pytorch_serves(dtype):
    torch.manual_seed(0)
    gate, up = torch.randn(2, 3, 5, 16).to(dtype)
    weight = torch.rand(16).to(dtype)
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)
    assert torch.equal(geglu(gate, up), F.gelu(gate, approximate="tanh") * up)
    assert torch.equal(rms_norm(gate, weight, 1e-5), _plain_norm(gate, weight, 1e-5))
    q, cos, sin = (torch.randn(2, heads, 7, 8).to(dtype) for heads in (3, 1, 1))
    wanted, _ = apply_rotary_pos_emb(q, q, cos[:, 0], sin[:, 0])
    assert torch.equal(rotate(q, cos[:, 0], sin[:, 0]), wanted)


def _close(found, wanted, size):
    """To 1e-6 of what was summed or multiplied."""
    assert found.shape == wanted.shape
    assert ((found - wanted).abs() <= 1e-6 * size + 1e-37).all()


@every_variant
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 30.0]))
def test_the_passes_in_cpp_are_the_references(kernels, rows, width, seed, scale):
    torch.manual_seed(seed)
    x, gate, up, grad = torch.randn(4, rows, width) * scale
    weight = torch.rand(width) - 0.5
    y, inverse = kernels.rms_norm(x, weight, 1e-5, False)
    wanted, wanted_inverse = reference.rms_norm(x.double(), weight.double(), 1e-5, False)
    _close(y, wanted, wanted.abs())
    _close(inverse, wanted_inverse, wanted_inverse)
    found = kernels.rms_norm_backward(grad, x, inverse, weight, False)
    wanted = reference.rms_norm_backward(grad.double(), x.double(), wanted_inverse, weight.double(), False)
    along = (grad * weight * x).abs().mean(1, keepdim=True) * inverse**2
    _close(found, wanted, 2 * ((grad * weight).abs() + x.abs() * along) * inverse)

    # The slope of a gate's inner function multiplies what (1 − σ) loses of its digits.
    inner = 1 + 2 * gate.abs() * (1 + 0.134 * gate**2) * (gate.abs() < 10)
    for kind, slope in (("swiglu", 1 + gate.abs()), ("geglu", inner)):
        y = getattr(kernels, kind)(gate, up)
        _close(y, getattr(reference, kind)(gate.double(), up.double()), (gate * up).abs())
        grads = getattr(kernels, f"{kind}_backward")(grad, gate, up)
        wanted = getattr(reference, f"{kind}_backward")(grad.double(), gate.double(), up.double())
        for found, exact, factor in zip(grads, wanted, (up * slope, gate), strict=True):
            _close(found, exact, (grad * factor).abs())


@every_variant
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.sampled_from([2, 6, 16, 64, 80]), st.booleans(),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_rotations_in_cpp_are_the_references(kernels, batch, heads, tokens, dim, for_all, as_queries_lie, seed):
    torch.manual_seed(seed)
    shape = (batch, tokens, heads, dim) if as_queries_lie else (batch, heads, tokens, dim)
    x = torch.randn(shape)
    x = x.transpose(1, 2) if as_queries_lie else x
    tables = torch.randn(2, 1 if for_all else batch, tokens, dim)
    for transposed in (False, True):
        found = kernels.rotate(x, *tables, transposed)
        torch.testing.assert_close(found, reference.rotate(x, *tables, transposed), rtol=1e-5, atol=1e-5)
        assert found.transpose(1, 2).is_contiguous()


@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_a_value_that_is_not_finite_or_huge_shows_in_its_own_place_alone(kernels, value):
    gate, up = torch.randn(2, 40)
    gate[7] = value
    wanted = F.gelu(gate, approximate="tanh") * up
    for found in (kernels.geglu(gate, up), *kernels.geglu_backward(up, gate, up)):
        assert torch.isfinite(found[torch.arange(40) != 7]).all()
    y = kernels.geglu(gate, up)
    torch.testing.assert_close(y[torch.arange(40) != 7], wanted[torch.arange(40) != 7])
    y = kernels.swiglu(gate, up)
    wanted = F.silu(gate) * up
    torch.testing.assert_close(y[:7], wanted[:7])
    torch.testing.assert_close(y[8:], wanted[8:])
    if value == 1e30 or value == float("inf"):
        assert y[7] == wanted[7]
    elif value == -1e30:
        assert y[7].abs() < 1e-5
    else:
        assert not torch.isfinite(y[7])
    x = torch.randn(2, 40)
    x[0, 3] = float("nan")
    assert torch.isnan(kernels.rms_norm(x, torch.ones(40), 1e-5, False)[0][0]).all()
    assert torch.isfinite(kernels.rms_norm(x, torch.ones(40), 1e-5, False)[0][1]).all()


def test_the_operators_keep_torchs_contracts():
    x, weight = torch.randn(3, 5, 16), torch.rand(16)
    inverse = reference.rms_norm(x, weight, 1e-5, False)[1]
    torch.library.opcheck(norm.rms_norm.operator, (x, weight, 1e-5, False))
    torch.library.opcheck(norm.rms_norm_backward.operator, (x, x, inverse, weight, False))
    torch.library.opcheck(gates.swiglu.operator, (x, x + 1))
    torch.library.opcheck(gates.swiglu_backward.operator, (x, x, x + 1))
    torch.library.opcheck(gates.geglu.operator, (x, x + 1))
    torch.library.opcheck(gates.geglu_backward.operator, (x, x, x + 1))
    torch.library.opcheck(rotation.rotate.operator, (torch.randn(1, 2, 5, 8), *torch.randn(2, 1, 5, 8), False))


@every_variant
def test_what_does_not_fit_is_refused(kernels):
    with pytest.raises(ValueError, match=r"^weight must be of shape"):
        kernels.rms_norm(torch.randn(2, 8), torch.ones(7), 1e-5, False)
    with pytest.raises(ValueError, match=r"^up must be of shape"):
        kernels.swiglu(torch.randn(2, 8), torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"^grad must be of shape"):
        kernels.swiglu_backward(torch.randn(2, 7), torch.randn(2, 8), torch.randn(2, 8))
    x, inverse = torch.randn(2, 8), torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"^grad must be of shape"):
        kernels.rms_norm_backward(x[:1], x, inverse, x[0], False)
    with pytest.raises(ValueError, match=r"^inverse must be of shape"):
        kernels.rms_norm_backward(x, x, inverse[:1], x[0], False)
    with pytest.raises(ValueError, match=r"^inverse must be of shape"):
        kernels.rms_norm_backward(x, x, torch.ones(3, 1), x[0], False)
    with pytest.raises(ValueError, match=r"sines must be of shape \(1, 5, 8\), not \(2, 4, 8\)"):
        kernels.rotate(torch.randn(2, 3, 5, 8), torch.randn(1, 5, 8), torch.randn(2, 4, 8), False)


def test_gradients_by_gradcheck():
    torch.manual_seed(0)
    x, y = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(swiglu, (x, y))
    assert torch.autograd.gradcheck(geglu, (x, y))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (x,))
    tables = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, *tables), (x,))


def test_gradients_in_half_precision_are_the_plain_ones():
    torch.manual_seed(0)
    weight, grad = torch.rand(64).bfloat16(), torch.randn(7, 64).bfloat16()
    found = []
    for normed, gated in ((rms_norm, swiglu), (_plain_norm, lambda gate, up: F.silu(gate) * up)):
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        found.append(torch.autograd.grad(normed(x, weight, 1e-5) + gated(x, x * 2), x, grad)[0])
    torch.testing.assert_close(*found)


def test_only_the_inputs_are_kept():
    saved = []
    gate, up = torch.randn(2, 8, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        swiglu(gate, up)
        rms_norm(gate, torch.ones(32), 1e-5)
    assert saved == [8 * 32, 8 * 32, 8 * 32, 8, 32]
