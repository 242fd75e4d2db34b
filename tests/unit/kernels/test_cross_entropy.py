"""Cross-entropy that leaves its gradient in the logits' place, against torch's in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from definitions import definitions
from veneer.kernels.backends import cpu
from veneer.kernels.extension import VARIANTS
from veneer.kernels.operations import cross_entropy as operations

pytestmark = pytest.mark.unit
reference = definitions(operations)
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
all_kernels = pytest.mark.parametrize(
    "kernels", [pytest.param(reference, id="definition"), *(pytest.param(cpu.Cpu(name), id=name) for name in VARIANTS)]
)
INFINITY = float("inf")


def _check(kernels, logits, labels, smoothing):
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    before = logits.clone()
    found = kernels.cross_entropy(logits, labels, smoothing)
    assert torch.equal(logits, before), "only read"
    for made in (found, kernels.cross_entropy_gradient(logits, labels, smoothing)):
        assert made.dtype == torch.float64
        # What a logit is below the largest one is rounded, and what it is multiplied by, too.
        torch.testing.assert_close(made, losses.detach(), rtol=1e-6, atol=2e-6)
    below = (exact.amax(1, keepdim=True) - exact).detach().clamp(max=100)
    allowed = 1e-6 * torch.softmax(exact.detach(), -1) * (1 + below) + 2e-7 * gradient.abs() + 1e-7 * smoothing + 1e-36
    if logits.dtype == torch.bfloat16:
        assert smoothing or (logits != gradient.bfloat16()).sum() <= 2 + 0.005 * logits.numel()
        allowed += 2**-7 * gradient.abs()
    assert ((logits - gradient).abs() <= allowed).all()


@all_kernels
@every_type
@given(
    st.integers(1, 9), st.one_of(st.integers(1, 200), st.sampled_from([4095, 4097])),
    st.sampled_from([0.01, 1.0, 8.0]), st.sampled_from([0.0, 1000.0]), st.sampled_from([0.0, 0.1, 1.0]),
    st.integers(0, 99),
)  # fmt: skip
def test_losses_and_gradients_are_torchs(kernels, dtype, rows, width, scale, offset, smoothing, seed):
    torch.manual_seed(seed)
    logits = (torch.randn(rows, width) * scale + offset).to(dtype)
    _check(kernels, logits, torch.randint(width, (rows,)), smoothing)


@all_kernels
@every_type
@pytest.mark.parametrize("first", [0, 40, 4100])
def test_masked_logits_have_no_share(kernels, dtype, first):
    """−∞, at the beginning of a row or on its way, is no NaN; where all are, and where one is ∞ or NaN, all is."""
    logits = torch.randn(7, 4200).to(dtype)
    logits[:, first : first + 60] = -INFINITY
    labels = torch.full((7,), 4190)
    logits[2] = -INFINITY
    logits[3, 11], logits[4, 4199] = float("nan"), INFINITY
    logits[5], logits[5, 4190] = -INFINITY, 3.0
    expected = torch.tensor([False, False, True, True, True, False, False])
    losses, before = F.cross_entropy(logits.double(), labels, reduction="none"), logits.clone()
    assert torch.equal(losses.isnan(), expected)
    for found in (kernels.cross_entropy(logits, labels, 0.0), kernels.cross_entropy_gradient(logits, labels, 0.0)):
        torch.testing.assert_close(found, losses, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(logits.isnan().all(1), expected)
    assert torch.equal(logits.isnan().any(1), expected)
    finite = logits[~expected]
    assert (finite[before[~expected] == -INFINITY] == 0).all()
    assert torch.equal(logits[5], torch.zeros(4200, dtype=dtype))


@all_kernels
@every_type
def test_the_largest_numbers_are_no_infinity(kernels, dtype):
    logits = torch.zeros(2, 50).to(dtype)
    logits[0, 3], logits[1, 7] = torch.finfo(dtype).max, torch.finfo(dtype).min
    losses = kernels.cross_entropy_gradient(logits, torch.tensor([3, 3]), 0.0)
    torch.testing.assert_close(losses, torch.tensor([0.0, 49.0]).double().clamp(min=1).log() * torch.tensor([0, 1]))
    wanted = torch.zeros(2, 50).double()
    wanted[1] = 1 / 49
    wanted[1, 7], wanted[1, 3] = 0, 1 / 49 - 1
    torch.testing.assert_close(logits.double(), wanted, rtol=4e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)


@all_kernels
@every_type
def test_logits_may_lie_apart_and_be_none(kernels, dtype):
    wide = torch.randn(5, 3, 33).to(dtype)
    labels = torch.randint(33, (5, 2))[:, 1]
    wanted = wide[:, 1].clone()
    losses = kernels.cross_entropy_gradient(wanted, labels, 0.1)
    around = wide[:, ::2].clone()
    torch.testing.assert_close(kernels.cross_entropy(wide[:, 1], labels, 0.1), losses)
    torch.testing.assert_close(kernels.cross_entropy_gradient(wide[:, 1], labels, 0.1), losses)
    torch.testing.assert_close(wide[:, 1], wanted)
    assert torch.equal(wide[:, ::2], around)
    assert kernels.cross_entropy_gradient(wanted[:0], labels[:0], 0.0).shape == (0,)


@all_kernels
@pytest.mark.parametrize("label", [-100, -1, 33, 2**40])
def test_a_label_that_is_no_logit_is_refused_and_nothing_is_written(kernels, label):
    logits, labels = torch.randn(20, 33), torch.zeros(20, dtype=torch.long)
    labels[3], before = label, logits.clone()
    for kernel in (kernels.cross_entropy, kernels.cross_entropy_gradient):
        with pytest.raises((IndexError, RuntimeError), match=r"(is not among 33 logits|out of bounds)"):
            kernel(logits, labels, 0.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("kernels", [pytest.param(cpu.Cpu(name), id=name) for name in VARIANTS])
def test_what_does_not_fit_is_refused(kernels):
    with pytest.raises(ValueError, match=r"^labels must be of shape \(3,\), not \(4,\)"):
        kernels.cross_entropy(torch.randn(3, 8), torch.zeros(4, dtype=torch.long), 0.0)
    with pytest.raises(ValueError, match=r"^labels must be torch.int64"):
        kernels.cross_entropy_gradient(torch.randn(3, 8), torch.zeros(3, dtype=torch.int32), 0.0)


@all_kernels
def test_other_types_are_computed_as_defined(kernels):
    labels = torch.randint(33, (5,))
    for dtype in (torch.float16, torch.float64):
        found, wanted = (torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
        losses = kernels.cross_entropy_gradient(found, labels, 0.1)
        assert torch.equal(losses, reference.cross_entropy_gradient(wanted, labels, 0.1))
        assert torch.equal(found, wanted)


@every_type
def test_the_operators_keep_torchs_contracts(dtype):
    logits, labels = torch.randn(5, 33).to(dtype), torch.randint(33, (5,))
    torch.library.opcheck(operations.cross_entropy.operator, (logits, labels, 0.1))
    torch.library.opcheck(operations.cross_entropy_gradient.operator, (logits, labels, 0.1))
