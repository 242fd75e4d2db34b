"""The hand-written product against plain PyTorch: values, gradients, and what it keeps and allocates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.frozen.weight import DenseWeight, QuantisedLinear
from veneer.updates import product
from veneer.updates.product import Factors, adapted_product

pytestmark = pytest.mark.unit


def _case(n=5, inside=6, out=7, rank=3, dtype=torch.float64, updates=1):
    torch.manual_seed(0)
    x = torch.randn(n, inside, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(out, inside, dtype=dtype), torch.randn(out, dtype=dtype)
    pairs = [
        (
            torch.randn(rank + i, inside, dtype=dtype, requires_grad=True),
            torch.randn(out, rank + i, dtype=dtype, requires_grad=True),
        )
        for i in range(updates)
    ]
    return x, weight, bias, pairs


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("updates", [1, 2])
def test_gradcheck(with_bias, transposed, updates):
    x, weight, bias, pairs = _case(updates=updates)
    frozen = DenseWeight(weight.t().contiguous() if transposed else weight, transposed)

    def product(x, *flat):
        factors = [Factors(A, B, 0.5 + i) for i, (A, B) in enumerate(zip(flat[::2], flat[1::2], strict=True))]
        return adapted_product(x, frozen, bias if with_bias else None, factors)

    assert torch.autograd.gradcheck(product, (x, *[factor for pair in pairs for factor in pair]))


def test_gradcheck_with_dropout():
    x, weight, bias, [(A, B)] = _case()

    def product(x, A, B):
        torch.manual_seed(3)  # the same elements dropped at every evaluation
        return adapted_product(x, DenseWeight(weight), bias, [Factors(A, B, 2.0, dropout=0.4)])

    assert torch.autograd.gradcheck(product, (x, A, B))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_singular_values_multiply_the_rows_of_a(dropout):
    x, weight, bias, [(A, B)] = _case()
    lam = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    frozen = DenseWeight(weight)

    def product(x, A, B, lam, factors=lambda A, B, lam: Factors(A, B, 2.0, dropout, lam)):
        torch.manual_seed(3)
        return adapted_product(x, frozen, bias, [factors(A, B, lam)])

    assert torch.autograd.gradcheck(product, (x, A, B, lam))
    as_one = product(x, A, B, lam, lambda A, B, lam: Factors(lam * A, B, 2.0, dropout))
    torch.testing.assert_close(product(x, A, B, lam), as_one)


def test_dropout_drops_the_updates_input_and_keeps_its_mean():
    x = torch.ones(2000, 8)
    A, B = torch.eye(8), torch.eye(8)
    frozen = DenseWeight(torch.zeros(8, 8))
    torch.manual_seed(0)
    y = adapted_product(x, frozen, None, [Factors(A, B, 1.0, dropout=0.25)])
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3]))
    assert float(y.mean()) == pytest.approx(1.0, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20), st.integers(1, 24), st.booleans())
def test_equals_the_formula(n, inside, out, rank, quantised):
    x, weight, bias, [(A, B)] = _case(n, inside, out, rank, torch.float32)
    frozen = DenseWeight(weight)
    if quantised:
        with torch.no_grad():
            linear = nn.Linear(inside, out)
            linear.weight.copy_(weight)
        frozen = QuantisedLinear.of(linear).frozen()
    expected = x @ frozen.dense().t() + bias + 0.7 * (x @ A.t()) @ B.t()
    y = adapted_product(x, frozen, bias, [Factors(A, B, 0.7)])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    down = torch.randn_like(expected)  # of y itself: where y is nearly zero, its last bits would be all there is
    wanted = torch.autograd.grad(expected, (x, A, B), down)
    got = torch.autograd.grad(y, (x, A, B), down)
    for ours, plain in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_saves_only_x_and_the_low_rank_product():
    x, weight, bias, [(A, B)] = _case(n=50, inside=40, out=30)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_product(x, DenseWeight(weight), bias, [Factors(A, B, 1.0, dropout=0.1)])
    own = {x.data_ptr(), A.data_ptr(), B.data_ptr()}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in own] == [(50, 3)]


class _Allocations(TorchDispatchMode):
    """Sizes of the tensors that operators give back as new memory."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs:
            self.sizes.append(result.numel())
        return result


def test_allocates_nothing_of_output_size_but_the_output():
    x, weight, bias, [(A, B)] = _case(n=64, inside=32, out=48)
    with _Allocations() as forward:
        y = adapted_product(x, DenseWeight(weight), bias, [Factors(A, B, 1.0)])
    assert sorted(forward.sizes, reverse=True)[:2] == [64 * 48, 64 * 3]
    grad = torch.ones_like(y)
    with _Allocations() as backward:
        y.backward(grad)
    # The gradient of x, those of A and B, and the one small product.
    assert sum(size >= 64 * 32 for size in backward.sizes) == 1
    assert 48 * 32 not in forward.sizes + backward.sizes, "B A is never formed"


def test_inputs_that_need_no_gradient_cost_none():
    x, weight, bias, [(A, B)] = _case()
    y = adapted_product(x.detach(), DenseWeight(weight), bias, [Factors(A, B, 1.0)])
    y.sum().backward()
    assert A.grad is not None
    assert x.grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_frozen_update_hands_gradients_on_and_costs_none_of_its_own(dropout, monkeypatch):
    torch.manual_seed(0)
    x, (A, B) = torch.randn(5, 6, requires_grad=True), (torch.randn(2, 6), torch.randn(4, 2))
    frozen = DenseWeight(torch.randn(4, 6))

    def grad_of_x(*factors):
        torch.manual_seed(1)
        y = adapted_product(x, frozen, None, [Factors(*factors, 2.0, dropout)])
        return torch.autograd.grad(y.square().sum(), x)[0]

    wanted = grad_of_x(A.clone().requires_grad_(), B.clone().requires_grad_())
    monkeypatch.setattr(product, "update_product_backward", lambda *given: pytest.fail("gradients of a frozen update"))
    torch.testing.assert_close(grad_of_x(A, B), wanted)


def test_autocast_computes_in_its_type():
    x, weight, bias, [(A, B)] = _case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted_product(x, DenseWeight(weight), bias, [Factors(A, B, 1.0)])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert A.grad.dtype == torch.float32
