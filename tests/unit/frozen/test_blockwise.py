"""Block-wise 4-bit storage, for weights of any shape: the nearest code, and panels that equal the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import ModelError
from veneer.frozen.blockwise import BLOCK, NESTED_BLOCK, expand, quantise, scales
from veneer.frozen.codebook import dynamic8, nf4

pytestmark = pytest.mark.unit

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 150))
LOGARITHMS = st.floats(-6, 4)


def _weight(shape, log10=0.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**log10


def _dense(quantised, dtype=torch.float32):
    return expand(quantised, scales(quantised), 0, quantised.shape[0], dtype)


def _codes(quantised):
    """(elements,) codes, in the order of the weight."""
    both = torch.stack([quantised.codes >> 4, quantised.codes & 15], dim=1).reshape(-1)
    return both[: quantised.shape[0] * quantised.shape[1]].long()


def _by_block(flat):
    """The elements of each block, the last one perhaps short."""
    return list(flat.split(BLOCK))


@given(SHAPES, LOGARITHMS, st.integers(0, 9))
def test_every_element_has_the_nearest_code_of_its_own_block(shape, log10, seed):
    weight = _weight(shape, log10, seed)
    quantised = quantise(weight)
    size = weight.numel()
    assert quantised.shape == shape
    assert quantised.codes.shape == ((size + 1) // 2,)
    assert quantised.scale_codes.shape == (-(-size // BLOCK),)
    for block, codes in zip(_by_block(weight.flatten()), _by_block(_codes(quantised)), strict=True):
        distances = (block[:, None] / block.abs().max() - nf4()).abs()
        chosen = distances.gather(1, codes[:, None])[:, 0]
        assert (chosen <= distances.amin(dim=1) + 1e-6).all()


@given(SHAPES, LOGARITHMS, st.integers(0, 9))
def test_every_scale_has_the_nearest_code(shape, log10, seed):
    weight = _weight(shape, log10, seed)
    # Blocks of different sizes, as the layers of a network have them.
    weight *= 10 ** torch.linspace(-2, 0, weight.numel()).view(shape)
    quantised = quantise(weight)
    absmax = torch.stack([block.abs().max() for block in _by_block(weight.flatten())])
    torch.testing.assert_close(quantised.offset, absmax.mean())
    wanted = (absmax - quantised.offset) / quantised.scale_scales.repeat_interleave(NESTED_BLOCK)[: len(absmax)]
    distances = (wanted.nan_to_num()[:, None] - dynamic8()).abs()
    chosen = distances.gather(1, quantised.scale_codes.long()[:, None])[:, 0]
    assert (chosen <= distances.amin(dim=1) + 1e-5).all()


@given(SHAPES, LOGARITHMS, st.integers(0, 9))
def test_what_comes_back_is_code_times_scale(shape, log10, seed):
    quantised = quantise(_weight(shape, log10, seed))
    by_element = scales(quantised).repeat_interleave(BLOCK)[: shape[0] * shape[1]]
    wanted = (nf4()[_codes(quantised)] * by_element).view(shape)
    assert torch.equal(_dense(quantised), wanted)
    assert torch.equal(_dense(quantised, torch.bfloat16), wanted.to(torch.bfloat16)), "multiplied in fp32, rounded once"


@given(SHAPES, st.data())
def test_any_panel_of_rows_equals_those_of_the_whole(shape, data):
    quantised = quantise(_weight(shape))
    first = data.draw(st.integers(0, shape[0] - 1))
    last = data.draw(st.integers(first + 1, shape[0]))
    assert torch.equal(expand(quantised, scales(quantised), first, last, torch.float32), _dense(quantised)[first:last])


@given(SHAPES, st.integers(0, 9))
def test_a_zero_is_kept_as_zero(shape, seed):
    """Above all in a block of zeros, whose scale comes back from its 8-bit code as not quite zero."""
    weight = _weight(shape, seed=seed)
    flat = weight.view(-1)
    flat[: BLOCK * (len(flat) // BLOCK // 2)] = 0
    flat[::3] = 0
    assert (_dense(quantise(weight))[weight == 0] == 0).all()
    assert torch.equal(_dense(quantise(torch.zeros(shape))), torch.zeros(shape))


def test_a_block_too_small_to_divide_by_is_zero():
    """1 / absmax overflows there, and 0 · ∞ would be NaN, whose code is the largest value."""
    weight = torch.zeros(2, BLOCK)
    weight[0, 0], weight[1] = 1e-40, 1.0
    assert (_dense(quantise(weight))[0, 1:] == 0).all()


def test_how_far_off_a_network_like_weight_is():
    """NF4's published error on normal weights; a wrong table, block or scale is much further off."""
    weight = _weight((256, 256), -1.5)
    error = (_dense(quantise(weight)) - weight).square().mean() / weight.square().mean()
    assert 0.0075 < float(error) < 0.0095


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_quantised_as_their_fp32_values(dtype):
    weight = _weight((3, 50)).to(dtype)
    ours, wanted = quantise(weight), quantise(weight.float())
    for name in ("codes", "scale_codes", "scale_scales", "offset"):
        assert torch.equal(getattr(ours, name), getattr(wanted, name))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named(value):
    weight = _weight((3, 50))
    weight[1, 7] = value
    with pytest.raises(
        ModelError, match=r"^layers\.0\.q_proj\.weight holds a value that is not finite, so it cannot be kept in 4 bits"
    ):
        quantise(weight, "layers.0.q_proj.weight")
