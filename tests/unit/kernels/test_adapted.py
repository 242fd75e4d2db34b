"""The adapted product in bf16 by tiles against the same sums in fp64, and the operators' contracts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from definitions import definitions
from guarded import guarded
from veneer.frozen.blockwise import dense, quantise
from veneer.kernels.backends.tiles import Tiles
from veneer.kernels.extension import VARIANTS, has_tiles
from veneer.kernels.operations import adapted

WITH_TILES = [name for name in VARIANTS if has_tiles(name)]
pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not WITH_TILES, reason="this processor, or the build, has no AMX tiles for bf16"),
]
reference = definitions(adapted)
ROUNDING = 2.0**-8  # half of the last bit of bf16, at most, of a number
TYPES = [torch.bfloat16, torch.float32, torch.float16]
STORAGES = ["nf4", "fp4", "int4", "int8"]


@pytest.fixture(scope="module")
def kernels() -> Tiles:
    return Tiles(WITH_TILES[-1])


def _drawn(tokens, into, out, rank, seed):
    """x, W, b, A, B and the gradient of y, each guarded."""
    made = torch.Generator().manual_seed(seed)
    shapes = {"x": (tokens, into), "W": (out, into), "b": (out,), "A": (rank, into), "B": (out, rank),
              "grad": (tokens, out)}  # fmt: skip
    of = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    for name in ("x", "grad"):
        of[name] = of[name].bfloat16()
    return {name: guarded(tensor) for name, tensor in of.items()}


def _close(found, wanted, size, roundings):
    """To so many roundings to bf16 of the sum of what was added up; fp32's own beside it."""
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= (roundings * ROUNDING + 1e-5) * size + 1e-30).all()


def _hold(product, gradients, of, W, scale, rank):
    """What they give is the formula's, with W (out, in) in fp64 as it is multiplied."""
    x, b, A, B, grad = (of[name].double() for name in ("x", "b", "A", "B", "grad"))
    y, low = product
    assert y.dtype is low.dtype is torch.bfloat16
    if not rank:
        A, B = A[:0], B[:, :0]
    low_size, grad_low_size = x.abs() @ A.abs().T, scale * grad.abs() @ B.abs()
    _close(low, x @ A.T, low_size, 2)
    size = x.abs() @ W.abs().T + b.abs() + scale * low_size @ B.abs().T
    _close(y, x @ W.T + b + scale * (x @ A.T) @ B.T, size, 4 if rank else 1)
    grad_x, grad_A, grad_B = gradients
    assert grad_x.dtype is torch.bfloat16
    grad_low = scale * grad @ B
    _close(grad_x, grad @ W + grad_low @ A, grad.abs() @ W.abs() + grad_low_size @ A.abs(), 4 if rank else 1)
    if rank:
        assert grad_A.dtype is grad_B.dtype is torch.float32
        _close(grad_A, grad_low.T @ x, grad_low_size.T @ x.abs(), 3)
        _close(grad_B, scale * grad.T @ (x @ A.T), scale * grad.abs().T @ low_size, 3)
    else:
        assert grad_A.numel() == grad_B.numel() == 0


@given(
    st.integers(1, 70), st.integers(1, 140), st.integers(1, 140), st.sampled_from([0, 1, 3, 8, 16, 17, 33, 64]),
    st.sampled_from([0.5, 2.0]), st.sampled_from(TYPES), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_the_product_and_its_gradients_are_the_formulas(
    kernels, tokens, into, out, rank, scale, dtype, transposed, seed
):
    of = _drawn(tokens, into, out, rank, seed)
    W = guarded(of["W"].to(dtype))
    W = guarded(W.t().contiguous()).t() if transposed else W
    A, B = (of["A"], of["B"]) if rank else (None, None)
    product = kernels.product_with_update(of["x"], W, of["b"], A, B, scale)
    gradients = kernels.product_with_update_backward(of["grad"], W, of["x"], product[1], A, B, scale, True, True)
    _hold(product, gradients, of, W.bfloat16().double(), scale, rank)


@given(
    st.integers(1, 70), st.integers(1, 140), st.integers(1, 140), st.sampled_from([0, 3, 16]),
    st.sampled_from(STORAGES), st.booleans(), st.sampled_from([32, 64, 128]), st.integers(0, 99),
)  # fmt: skip
def test_over_codes_they_are_those_of_the_expanded_weight(
    kernels, tokens, into, out, rank, storage, nested, block, seed
):
    of = _drawn(tokens, into, out, rank, seed)
    quantised = quantise(of["W"], storage=storage, block_size=block, double_quantisation=nested)
    A, B = (of["A"], of["B"]) if rank else (None, None)
    product = kernels.product_with_update_coded(of["x"], quantised.coded, of["b"], A, B, 2.0)
    gradients = kernels.product_with_update_coded_backward(
        of["grad"], quantised.coded, of["x"], product[1], A, B, 2.0, True, True
    )  # fmt: skip
    W = dense(quantised, torch.bfloat16)
    _hold(product, gradients, of, W.double(), 2.0, rank)
    # The same expanded values take the same way, so the bits are equal, too.
    same = kernels.product_with_update(of["x"], W, of["b"], A, B, 2.0)
    again = kernels.product_with_update_backward(of["grad"], W, of["x"], same[1], A, B, 2.0, True, True)
    assert all(torch.equal(a, b) for a, b in zip((*product, *gradients), (*same, *again), strict=True))


@pytest.mark.parametrize(
    ("tokens", "into", "out"), [(700, 640, 96), (90, 2500, 64), (70, 64, 2500), (1300, 2100, 40)]
)  # fmt: skip
def test_long_sums_and_many_rows_are_gone_through_in_parts(kernels, tokens, into, out):
    of = _drawn(tokens, into, out, 8, 0)
    for storage in ("dense", "nf4"):
        if storage == "dense":
            W = of["W"].bfloat16()
            product = kernels.product_with_update(of["x"], W, of["b"], of["A"], of["B"], 0.5)
            gradients = kernels.product_with_update_backward(
                of["grad"], W, of["x"], product[1], of["A"], of["B"], 0.5, True, True
            )  # fmt: skip
        else:
            quantised = quantise(of["W"], storage=storage)
            W = dense(quantised, torch.bfloat16)
            product = kernels.product_with_update_coded(of["x"], quantised.coded, of["b"], of["A"], of["B"], 0.5)
            gradients = kernels.product_with_update_coded_backward(
                of["grad"], quantised.coded, of["x"], product[1], of["A"], of["B"], 0.5, True, True
            )  # fmt: skip
        _hold(product, gradients, of, W.double(), 0.5, 8)


def test_the_bits_do_not_depend_on_the_threads(kernels):
    of = _drawn(333, 200, 160, 8, 0)
    W = of["W"].bfloat16()
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7, 16):
            torch.set_num_threads(count)
            product = kernels.product_with_update(of["x"], W, of["b"], of["A"], of["B"], 0.5)
            gradients = kernels.product_with_update_backward(
                of["grad"], W, of["x"], product[1], of["A"], of["B"], 0.5, True, True
            )  # fmt: skip
            found.append((*product, *gradients))
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))


def test_what_is_not_wanted_is_empty_and_the_rest_has_the_same_bits(kernels):
    of = _drawn(50, 96, 64, 8, 1)
    W = of["W"].bfloat16()
    _, low = kernels.product_with_update(of["x"], W, None, of["A"], of["B"], 0.5)
    whole = kernels.product_with_update_backward(of["grad"], W, of["x"], low, of["A"], of["B"], 0.5, True, True)
    for wants_x, wants_update in [(True, False), (False, True), (False, False)]:
        part = kernels.product_with_update_backward(
            of["grad"], W, of["x"], low, of["A"], of["B"], 0.5, wants_x, wants_update
        )  # fmt: skip
        for found, wanted, asked in zip(part, whole, (wants_x, wants_update, wants_update), strict=True):
            assert torch.equal(found, wanted) if asked else found.numel() == 0


def test_other_layouts_and_types_are_served_as_well(kernels):
    of = _drawn(40, 64, 48, 5, 2)
    W = of["W"].double()
    strided = torch.zeros(48, 64, 2)
    strided[:, :, 0] = of["W"]
    wanted = kernels.product_with_update(of["x"], of["W"].bfloat16(), of["b"], of["A"], of["B"], 2.0)
    x = of["x"].t().contiguous().t()
    for weight in (W, strided[:, :, 0]):
        found = kernels.product_with_update(
            x, weight, of["b"].double(), of["A"].double(), of["B"].t().contiguous().t(), 2.0
        )
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    exact = kernels.product_with_update(of["x"].float(), of["W"], of["b"], of["A"], of["B"], 2.0)  # by the definition
    assert exact[0].dtype is torch.float32
    torch.testing.assert_close(
        exact, reference.product_with_update(of["x"].float(), of["W"], of["b"], of["A"], of["B"], 2.0)
    )
    empty = kernels.product_with_update(of["x"][:0], of["W"], of["b"], of["A"], of["B"], 2.0)
    assert [tuple(part.shape) for part in empty] == [(0, 48), (0, 5)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(kernels, value):
    of = _drawn(40, 64, 48, 5, 3)
    x = of["x"].clone()
    x[17, 3] = value
    y, low = kernels.product_with_update(x, of["W"].bfloat16(), of["b"], of["A"], of["B"], 2.0)
    others = [row for row in range(40) if row != 17]
    assert not torch.isfinite(y[17]).any() and not torch.isfinite(low[17]).any()  # noqa: PT018
    assert torch.isfinite(y[others]).all()


def test_a_wrong_shape_is_refused_before_an_address_is_passed(kernels):
    of = _drawn(4, 64, 48, 5, 0)
    W = of["W"].bfloat16()
    with pytest.raises(ValueError, match=r"x must be of shape \(4, 64\)"):
        kernels.product_with_update(of["x"][:, :32], W, None, None, None, 0.0)
    with pytest.raises(ValueError, match=r"A must be of shape"):
        kernels.product_with_update(of["x"], W, None, of["A"][:, :32], of["B"], 1.0)
    with pytest.raises(ValueError, match=r"B must be of shape"):
        kernels.product_with_update(of["x"], W, None, of["A"], of["B"][:20], 1.0)
    with pytest.raises(ValueError, match=r"bias must be of shape"):
        kernels.product_with_update(of["x"], W, of["b"][:20], None, None, 0.0)
    with pytest.raises(ValueError, match=r"grad must be of shape"):
        kernels.product_with_update_backward(of["grad"][:, :20], W, of["x"], of["x"], None, None, 0.0, True, False)


def test_torchs_own_bf16_products_and_these_leave_each_others_tiles_alone(kernels):
    of = _drawn(128, 128, 128, 8, 0)
    W = of["W"].bfloat16()
    ours, theirs = kernels.product_with_update(of["x"], W, None, None, None, 0.0)[0], torch.mm(of["x"], W)
    for _ in range(3):
        assert torch.equal(torch.mm(of["x"], W), theirs)
        assert torch.equal(kernels.product_with_update(of["x"], W, None, None, None, 0.0)[0], ours)
