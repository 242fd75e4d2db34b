"""The low-rank update's products in C++ against the reference in fp64, and the operators' contracts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from definitions import definitions
from veneer.kernels.backends import cpu
from veneer.kernels.extension import VARIANTS
from veneer.kernels.operations import update

pytestmark = pytest.mark.unit
reference = definitions(update)
every_variant = pytest.mark.parametrize("kernels", [pytest.param(cpu.Cpu(name), id=name) for name in VARIANTS])


def _close(found, wanted, size):
    """To 1e-6 of the sum of what was added up."""
    assert found.shape == wanted.shape
    assert ((found - wanted).abs() <= 1e-6 * size + 1e-37).all()


def _drawn(tokens, into, out, rank, seed):
    torch.manual_seed(seed)
    shapes = {"x": (tokens, into), "A": (rank, into), "B": (out, rank), "y": (tokens, out), "grad": (tokens, out),
              "grad_x": (tokens, into)}  # fmt: skip
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@every_variant
@given(
    st.integers(1, 40), st.integers(1, 90), st.integers(1, 90), st.integers(1, 24), st.sampled_from([0.5, 2.0]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_the_update_and_its_gradients_in_cpp_are_the_references(kernels, tokens, into, out, rank, scale, below, seed):
    of = _drawn(tokens, into, out, rank, seed)
    x, A, B, grad = (of[name] for name in ("x", "A", "B", "grad"))
    y, grad_x = of["y"].clone(), of["grad_x"].clone() if below else None
    low = kernels.update_product(x, A, B, scale, y)
    grads = kernels.update_product_backward(grad, x, low, A, B, scale, grad_x)

    exact = {name: tensor.double() for name, tensor in of.items()}
    wanted_low = reference.update_product(exact["x"], exact["A"], exact["B"], scale, exact["y"])
    wanted = reference.update_product_backward(
        exact["grad"], exact["x"], wanted_low, exact["A"], exact["B"], scale, exact["grad_x"]
    )  # fmt: skip
    sizes = {name: tensor.abs() for name, tensor in of.items()}
    size_of_low, size_of_grad_low = sizes["x"] @ sizes["A"].T, scale * sizes["grad"] @ sizes["B"]
    _close(low, wanted_low, size_of_low)
    _close(y, exact["y"], sizes["y"] + scale * size_of_low @ sizes["B"].T)
    _close(grads[0], wanted[0], size_of_grad_low.T @ sizes["x"])
    _close(grads[1], wanted[1], scale * sizes["grad"].T @ size_of_low)
    if grad_x is not None:
        _close(grad_x, exact["grad_x"], sizes["grad_x"] + size_of_grad_low @ sizes["A"])


@every_variant
def test_shared_among_threads_it_gives_the_same_bits_each_time(kernels):
    of = _drawn(70, 300, 500, 7, 0)  # enough to be shared
    found = []
    for _ in range(3):
        y, grad_x = of["y"].clone(), of["grad_x"].clone()
        low = kernels.update_product(of["x"], of["A"], of["B"], 2.0, y)
        grads = kernels.update_product_backward(of["grad"], of["x"], low, of["A"], of["B"], 2.0, grad_x)
        found.append((low, y, grad_x, *grads))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


@every_variant
def test_other_layouts_types_and_ranks_are_served_as_well(kernels):
    of = _drawn(6, 20, 30, 3, 0)
    wanted_y = of["y"].clone()
    wanted_low = reference.update_product(of["x"], of["A"], of["B"], 2.0, wanted_y)
    y = of["y"].t().contiguous().t()  # columns first
    low = kernels.update_product(of["x"].t().contiguous().t(), of["A"], of["B"].t().contiguous().t(), 2.0, y)
    torch.testing.assert_close((low, y), (wanted_low, wanted_y))
    half = {name: of[name].bfloat16() for name in ("x", "y")}
    assert kernels.update_product(half["x"], of["A"], of["B"], 2.0, half["y"]).dtype == torch.bfloat16
    torch.testing.assert_close(half["y"].float(), wanted_y, rtol=0.05, atol=0.3)
    of = _drawn(6, 20, 30, 60, 0)
    wanted_y = of["y"].clone()
    wanted_low = reference.update_product(of["x"], of["A"], of["B"], 2.0, wanted_y)
    assert torch.equal(kernels.update_product(of["x"], of["A"], of["B"], 2.0, of["y"]), wanted_low)
    assert torch.equal(of["y"], wanted_y)


@every_variant
def test_a_value_that_is_not_finite_shows_in_its_own_row_alone(kernels):
    of = _drawn(9, 40, 50, 5, 0)
    of["x"][3, 39] = float("nan")
    low = kernels.update_product(of["x"], of["A"], of["B"], 2.0, of["y"])
    others = torch.arange(9) != 3
    assert torch.isnan(low[3]).all()
    assert torch.isnan(of["y"][3]).all()
    assert torch.isfinite(low[others]).all()
    assert torch.isfinite(of["y"][others]).all()


def test_the_operators_keep_torchs_contracts():
    of = _drawn(5, 16, 24, 3, 0)
    torch.library.opcheck(update.update_product.operator, (of["x"], of["A"], of["B"], 2.0, of["y"]))
    low = of["x"] @ of["A"].T
    for grad_x in (of["grad_x"], None):
        arguments = (of["grad"], of["x"], low, of["A"], of["B"], 2.0, grad_x)
        torch.library.opcheck(update.update_product_backward.operator, arguments)


@every_variant
def test_what_does_not_fit_is_refused(kernels):
    of = _drawn(5, 16, 24, 3, 0)
    low = of["x"] @ of["A"].T
    with pytest.raises(ValueError, match=r"^A must be of shape"):
        kernels.update_product(of["x"], of["A"][:, :15], of["B"], 2.0, of["y"])
    with pytest.raises(ValueError, match=r"^y must be of shape"):
        kernels.update_product(of["x"], of["A"], of["B"], 2.0, of["y"][:4])
    for name, index in (("grad", 0), ("low", 2), ("grad_x", 6)):
        arguments = [of["grad"], of["x"], low, of["A"], of["B"], 2.0, of["grad_x"]]
        arguments[index] = arguments[index][:4]
        with pytest.raises(ValueError, match=rf"^{name} must be"):
            kernels.update_product_backward(*arguments)
