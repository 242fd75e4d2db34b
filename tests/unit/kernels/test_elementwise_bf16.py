"""The passes in bf16: in C++ as the definitions, and those as transformers' modules, rounded where these round."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

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
STEP = 2**-7  # between neighbours of bf16, of the smaller one's size at most
KINDS = {"swiglu": F.silu, "geglu": lambda x: F.gelu(x, approximate="tanh")}


def _drawn(*shape, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def _near(found, wanted, size, steps=1, others=0.02):
    """Equal, except that a few numbers are rounded the other way where fp32's own rounding decides: 1e-6 of what was
    summed or multiplied, which is all that is left of the tail of GELU in torch."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype == torch.bfloat16
    far = (found.float() - wanted.float()).abs() > steps * STEP * wanted.float().abs() + 1e-6 * size + 1e-37
    assert not far.any(), (found[far], wanted[far])
    counted = wanted.float().abs() > 0.01 * size
    assert (counted & (found != wanted)).sum() <= 2 + others * found.numel()


@every_variant
@given(
    st.integers(1, 9), st.integers(1, 300), st.sampled_from([1e-3, 1.0, 30.0]),
    st.sampled_from([torch.bfloat16, torch.float32]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_norms_in_cpp_are_the_definitions(kernels, rows, width, scale, of_weight, once, seed):
    x, grad = _drawn(2, rows, width, seed=seed, scale=scale)
    weight = _drawn(width, seed=seed + 1).to(of_weight)
    y, inverse = kernels.rms_norm(x, weight, 1e-5, once)
    wanted, wanted_inverse = reference.rms_norm(x, weight, 1e-5, once)
    torch.testing.assert_close(inverse, wanted_inverse, rtol=1e-6, atol=0)
    # A number that is rounded the other way before it is multiplied may be two steps off.
    _near(y, wanted, wanted.float().abs(), steps=2)
    found = kernels.rms_norm_backward(grad, x, wanted_inverse, weight, once)
    wanted = reference.rms_norm_backward(grad, x, wanted_inverse, weight, once)
    product = (grad.float() * weight.float()).abs()
    along = (product * x.float().abs()).mean(1, keepdim=True) * inverse**2
    _near(found, wanted, (product + x.float().abs() * along) * inverse)


@every_variant
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from([1e-3, 1.0, 5.0]), st.integers(0, 99))
def test_gates_in_cpp_are_the_definitions(kernels, rows, width, scale, seed):
    gate, up, grad = _drawn(3, rows, width, seed=seed, scale=scale)
    sizes = gate.float().abs(), up.float().abs(), grad.float().abs()
    inner = 1 + 2 * sizes[0] * (1 + 0.134 * sizes[0] ** 2)
    for kind, slope in (("swiglu", 1 + sizes[0]), ("geglu", inner)):
        _near(getattr(kernels, kind)(gate, up), getattr(reference, kind)(gate, up), sizes[0] * sizes[1], steps=2)
        found = getattr(kernels, f"{kind}_backward")(grad, gate, up)
        wanted = getattr(reference, f"{kind}_backward")(grad, gate, up)
        _near(found[0], wanted[0], sizes[2] * sizes[1] * slope)
        _near(found[1], wanted[1], sizes[2] * sizes[0], steps=2)


@every_variant
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_gate_that_there_is(kernels, kind):
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    gate = gate[(gate.abs() <= 80) | gate.isnan()]
    found, wanted = getattr(kernels, kind)(gate, torch.ones_like(gate)), KINDS[kind](gate)
    assert torch.equal(found.isnan(), gate.isnan())
    numbers = ~gate.isnan()
    _near(found[numbers], wanted[numbers], gate[numbers].float().abs(), others=0.001 if kind == "swiglu" else 0.02)


@every_variant
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.sampled_from([2, 6, 16, 64, 80]), st.booleans(),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_rotations_in_cpp_are_the_definitions_to_the_bit(kernels, batch, heads, tokens, dim, for_all, lying, seed):
    x = _drawn(batch, tokens, heads, dim, seed=seed).transpose(1, 2)
    x = x if lying else x.contiguous()
    tables = _drawn(2, 1 if for_all else batch, tokens, dim, seed=seed + 1)
    for transposed in (False, True):
        found = kernels.rotate(x, *tables, transposed)
        assert torch.equal(found, reference.rotate(x, *tables, transposed))
        assert found.transpose(1, 2).is_contiguous()


@every_variant
def test_inputs_may_lie_in_any_way_and_be_none(kernels):
    wide = _drawn(6, 2, 40)
    gate, up, weight = wide[:, 0], wide[:, 1], _drawn(40, 2)[:, 0]
    assert torch.equal(kernels.swiglu(gate, up), kernels.swiglu(gate.clone(), up.clone()))
    found, wanted = (kernels.rms_norm(x, w, 1e-5, False) for x, w in ((gate, weight), (gate.clone(), weight.clone())))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert torch.equal(
        kernels.rms_norm_backward(up, gate, found[1], weight, False),
        kernels.rms_norm_backward(up.clone(), gate.clone(), found[1], weight.clone(), False),
    )
    none = gate[:0]
    assert kernels.swiglu(none, none).shape == kernels.rms_norm(none, weight, 1e-5, False)[0].shape == (0, 40)
    angles = weight.new_zeros(1, 0, 8)
    assert kernels.rotate(weight.new_zeros(1, 2, 0, 8), angles, angles, False).shape == (1, 2, 0, 8)


@every_variant
def test_what_is_of_two_types_is_computed_as_defined(kernels):
    x, weight = _drawn(2, 16), _drawn(16)
    for once in (False, True):
        for found, wanted in zip(
            kernels.rms_norm(x.half(), weight, 1e-5, once),
            reference.rms_norm(x.half(), weight, 1e-5, once),
            strict=True,
        ):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    tables = torch.randn(2, 1, 2, 4)
    found, wanted = (made.rotate(x.view(1, 4, 2, 4), *tables, False) for made in (kernels, reference))
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_a_value_that_is_not_finite_or_huge_shows_in_its_own_place_alone(kernels, value):
    gate, up = _drawn(2, 41)
    others = torch.arange(41) != 37
    whole = {kind: getattr(kernels, kind)(gate, up) for kind in KINDS}
    gate[37] = value
    for kind, activation in KINDS.items():
        y = getattr(kernels, kind)(gate, up)
        assert torch.equal(y[others], whole[kind][others])
        for found in getattr(kernels, f"{kind}_backward")(up, gate, up):
            assert torch.isfinite(found[others]).all()
        if value in (1e30, float("inf")):
            assert y[37] == (activation(gate) * up)[37]
        elif value == -1e30:
            assert y[37].abs() < 1e-5
        else:
            assert not torch.isfinite(y[37])
    x = _drawn(2, 41)
    x[0, 3] = value
    for once in (False, True):
        for y in (
            kernels.rms_norm(x, torch.ones(41), 1e-5, once)[0],
            kernels.rms_norm_backward(x, x, torch.ones(2, 1), torch.ones(41), once),
        ):
            assert torch.isfinite(y[1]).all()
            assert torch.isnan(y[0]).all() == (value != value)


def test_values_and_gradients_are_those_of_transformers_modules():
    """Where both round once at the same places, only what decides a tie is another."""
    x, grad = _drawn(2, 64, 576).unbind(0)
    for kind, once in ((LlamaRMSNorm, False), (GemmaRMSNorm, True)):
        module = kind(576).requires_grad_(False).bfloat16()
        module.weight.copy_(_drawn(576, seed=1) * 0.5)
        weight = 1 + module.weight.float() if once else module.weight
        found, wanted = (_with_gradient(made, x, grad) for made in (lambda x: rms_norm(x, weight, 1e-6, once), module))  # noqa: B023
        _near(found[0], wanted[0], wanted[0].float().abs(), steps=2)
        _near(found[1], wanted[1], grad.float().abs() * weight.float().abs())
    for name, activation in KINDS.items():
        product = {"swiglu": swiglu, "geglu": geglu}[name]
        found, wanted = (
            _with_gradient(made, x, grad)
            for made in (lambda x: product(x, x * 2), lambda x: activation(x) * (x * 2))  # noqa: B023
        )
        size = 8 * grad.float().abs() * (1 + x.float() ** 2)
        _near(found[0], wanted[0], 2 * x.float() ** 2, steps=2)
        _near(found[1], wanted[1], size, steps=2)
    q, cos, sin = _drawn(2, 3, 64, 16), *_drawn(2, 2, 64, 16, seed=3)
    found, wanted = (
        _with_gradient(made, q, _drawn(2, 3, 64, 16, seed=4))
        for made in (lambda q: rotate(q, cos, sin), lambda q: apply_rotary_pos_emb(q, q, cos, sin)[0])
    )
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def _with_gradient(function, x, grad):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), *torch.autograd.grad(y, x, grad)
