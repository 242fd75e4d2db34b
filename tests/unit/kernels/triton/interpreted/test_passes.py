"""Norms, gates, rotations and cross-entropies: the definitions', with their roundings in 16 bits."""

from __future__ import annotations

import pytest
import torch

from veneer.kernels.operations import adamw, cross_entropy, gates, norm, residual_norm, rotation

pytestmark = pytest.mark.unit

TYPES = [torch.float32, torch.bfloat16, torch.float16]
every_type = pytest.mark.parametrize("dtype", TYPES)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got, wanted):
    """Equal up to last bits of exp and of sums: in 16 bits, where only a value near a tie is rounded the other way,
    nearly all are equal."""
    assert got.shape == wanted.shape
    assert got.dtype is wanted.dtype
    exact = got.double(), wanted.double()
    if wanted.dtype is torch.float32:
        assert (exact[0] - exact[1]).norm() <= 3e-7 * exact[1].norm()
    else:
        assert ((exact[0] - exact[1]).abs() <= 2 * torch.finfo(wanted.dtype).eps * exact[1].abs() + 1e-7).all()
        assert (got == wanted).double().mean() > 0.98


@every_type
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 100), (1, 3), (5, 1025)])
@pytest.mark.parametrize("exact_weight", [False, True])
def test_rms_norm_and_its_gradient(dtype, once, shape, exact_weight):
    x, grad = (3 * drawn(*shape)).to(dtype), drawn(*shape, seed=1).to(dtype)
    weight = drawn(shape[-1], seed=2).to(torch.float32 if exact_weight else dtype)
    y, inverse = norm.rms_norm(x, weight, 1e-5, once)
    wanted_y, wanted_inverse = norm.rms_norm.definition(x, weight, 1e-5, once)
    close(y, wanted_y)
    close(inverse, wanted_inverse)
    close(
        norm.rms_norm_backward(grad, x, wanted_inverse, weight, once),
        norm.rms_norm_backward.definition(grad, x, wanted_inverse, weight, once),
    )


@every_type
@pytest.mark.parametrize(("once", "shape"), [(False, (3, 64)), (True, (2, 3, 100))])
def test_rms_norm_of_a_sum_and_its_gradient(dtype, once, shape):
    x, residual, grad, beside = (drawn(*shape, seed=seed).to(dtype) for seed in range(4))
    weight = drawn(shape[-1], seed=4).to(dtype)
    wanted = residual_norm.add_rms_norm.definition(x, residual, weight, 1e-5, once)
    total, y, inverse = residual_norm.add_rms_norm(x, residual, weight, 1e-5, once)
    assert torch.equal(total, wanted[0])
    close(y, wanted[1])
    close(inverse, wanted[2])
    gradients = grad, beside, total, wanted[2], weight, once
    got = residual_norm.add_rms_norm_backward(*gradients)
    exact = residual_norm.add_rms_norm_backward.definition(*gradients)
    assert (got - exact).double().norm() <= max(3e-7, torch.finfo(dtype).eps / 8) * exact.double().norm()


@pytest.mark.parametrize("size", [1, 1000, 2049])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_the_definitions_bits(size, decay):
    got = [drawn(size), torch.zeros(size), torch.zeros(size)]
    wanted = [tensor.clone() for tensor in got]
    for step in (1, 2, 100):
        gradient = drawn(size, seed=step)
        for (values, mean, square), run in ((got, adamw.adamw), (wanted, adamw.adamw.definition)):
            run(values, gradient, mean, square, 1e-3, 0.9, 0.999, 1e-8, decay, step)
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)


def test_rms_norm_of_x_whose_rows_lie_apart():
    x, weight = drawn(40, 7).t(), drawn(40)
    close(norm.rms_norm(x, weight, 1e-5, False)[0], norm.rms_norm.definition(x, weight, 1e-5, False)[0])


@every_type
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("shape", [(9, 100), (1,), (2, 3, 513)])
def test_gates_and_their_gradients(dtype, name, shape):
    gate, up, grad = (drawn(*shape, seed=seed).to(dtype) for seed in range(3))
    forward, backward = getattr(gates, name), getattr(gates, f"{name}_backward")
    wanted, wanted_backward = forward.definition(gate, up), backward.definition(grad, gate, up)
    close(forward(gate, up), wanted)
    for got, gradient in zip(backward(grad, gate, up), wanted_backward, strict=True):
        close(got, gradient)


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gates_of_large_values_are_finite(name):
    gate = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0])
    one = torch.ones(5)
    close(getattr(gates, name)(gate, one), getattr(gates, name).definition(gate, one))
    for got in getattr(gates, f"{name}_backward")(one, gate, one):
        assert got.isfinite().all()


@every_type
@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_of_a_gate_may_take_its_place(dtype, gelu):
    from veneer.kernels.triton.gates import gated_gradient

    gate, up, grad = (drawn(1030, seed=seed).to(dtype) for seed in range(3))
    wanted = (gates.geglu_backward if gelu else gates.swiglu_backward)(grad, gate, up)
    gated_gradient[(2,)](grad, gate, up, gate, up, 1030, GELU=gelu, WIDTH=1024)
    assert torch.equal(gate, wanted[0])
    assert torch.equal(up, wanted[1])


@every_type
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "dim", "tables"), [(2, 3, 7, 16, 2), (2, 5, 4, 80, 1), (1, 1, 1, 2, 1)]
)
def test_rotations_are_the_definitions_bits(dtype, transposed, batch, heads, tokens, dim, tables):
    x = drawn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
    cosines, sines = drawn(tables, tokens, dim, seed=1).to(dtype), drawn(tables, tokens, dim, seed=2).to(dtype)
    wanted = rotation.rotate.definition(x, cosines, sines, transposed)
    for strided in (x, x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3)):
        got = rotation.rotate(strided, cosines, sines, transposed)
        assert torch.equal(got, wanted)
        assert got.stride() == wanted.stride()


def test_rotation_within_a_product_of_q_k_and_v():
    q = drawn(2, 5, 3 * 32)[..., 32:64].view(2, 5, 2, 16).transpose(1, 2)
    cosines, sines = drawn(1, 5, 16, seed=1), drawn(1, 5, 16, seed=2)
    assert torch.equal(rotation.rotate(q, cosines, sines, False), rotation.rotate.definition(q, cosines, sines, False))


@every_type
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("vocabulary", [2, 1000, 4096, 9001])
def test_cross_entropy_and_its_gradient_in_the_logits_place(dtype, smoothing, vocabulary):
    logits = (5 * drawn(3, vocabulary)).to(dtype)
    labels = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    losses, gradient = cross_entropy.cross_entropy(logits, labels, smoothing), logits.clone()
    wanted_gradient = logits.clone()
    wanted = cross_entropy.cross_entropy_gradient.definition(wanted_gradient, labels, smoothing)
    assert losses.dtype is torch.float64
    assert torch.equal(cross_entropy.cross_entropy_gradient(gradient, labels, smoothing), losses)
    assert (losses - wanted).norm() <= 1e-6 * wanted.norm()
    assert (gradient - wanted_gradient).double().norm() <= max(
        1e-6, torch.finfo(dtype).eps
    ) * wanted_gradient.double().norm()  # fmt: skip


def test_rows_of_logits_that_lie_apart_stay_apart():
    room = torch.full((4, 40), 7.0)
    room[:, :33] = drawn(4, 33)
    labels, wanted = torch.arange(4), room[:, :33].clone()
    cross_entropy.cross_entropy_gradient(room[:, :33], labels, 0.0)
    cross_entropy.cross_entropy_gradient.definition(wanted, labels, 0.0)
    assert (room[:, :33] - wanted).norm() <= 1e-6 * wanted.norm()
    assert (room[:, 33:] == 7).all()


def test_logits_far_from_zero_and_minus_infinity():
    logits = drawn(2, 50) + 1000
    logits[0, 7] = -float("inf")
    labels = torch.tensor([3, 4])
    wanted = cross_entropy.cross_entropy.definition(logits, labels, 0.0)
    assert (cross_entropy.cross_entropy(logits, labels, 0.0) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_is_seen_in_the_loss(bad):
    logits = drawn(2, 50)
    logits[1, 7] = bad
    losses = cross_entropy.cross_entropy(logits, torch.tensor([3, 4]), 0.0)
    assert losses[0].isfinite()
    assert losses[1].isnan()


def test_a_label_outside_the_vocabulary_reads_nothing_beside_the_row():
    assert cross_entropy.cross_entropy(drawn(1, 50), torch.tensor([50]), 0.0).isnan().all()
