"""Block-wise storage, for weights of any shape: the nearest code, and panels that equal the whole."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import ModelError
from veneer.frozen import blockwise
from veneer.frozen.blockwise import NESTED_BLOCK, dense, expand, quantise
from veneer.frozen.codebook import codebook, dynamic8
from veneer.frozen.config import BLOCK_SIZES, CODE_BITS

pytestmark = pytest.mark.unit

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 150))
LOGARITHMS = st.floats(-6, 4)
HOW = st.fixed_dictionaries(
    {
        "storage": st.sampled_from(list(CODE_BITS)),
        "block_size": st.sampled_from(BLOCK_SIZES),
        "double_quantisation": st.booleans(),
    }
)


def _weight(shape, log10=0.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**log10


def _codes(quantised):
    """(elements,) codes, in the order of the weight."""
    codes = quantised.codes
    if CODE_BITS[quantised.storage] == 4:
        codes = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1)
    return codes[: quantised.shape[0] * quantised.shape[1]].long()


def _scales(q):
    """The scale of every block, fp32 (blocks,)."""
    if q.nested_scales is None:
        return q.scales
    return dynamic8()[q.scales.int()] * q.nested_scales.repeat_interleave(NESTED_BLOCK)[: q.blocks] + q.offset


def _same(ours, wanted):
    for field in fields(ours):
        a, b = getattr(ours, field.name), getattr(wanted, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@given(SHAPES, LOGARITHMS, st.integers(0, 9), HOW)
def test_every_element_has_the_nearest_code_of_its_own_block(shape, log10, seed, how):
    weight = _weight(shape, log10, seed)
    quantised = quantise(weight, **how)
    size, block = weight.numel(), how["block_size"]
    assert (quantised.shape, quantised.storage, quantised.block_size) == (shape, how["storage"], block)
    assert quantised.codes.shape == (-(-size * CODE_BITS[how["storage"]] // 8),)
    assert quantised.scales.shape == (-(-size // block),) == (quantised.blocks,)
    assert quantised.scales.dtype == (torch.uint8 if how["double_quantisation"] else torch.float32)
    for part, codes in zip(weight.flatten().split(block), _codes(quantised).split(block), strict=True):
        distances = (part[:, None] / part.abs().max() - codebook(how["storage"])).abs()
        chosen = distances.gather(1, codes[:, None])[:, 0]
        assert (chosen <= distances.amin(dim=1) + 1e-6).all()


@given(SHAPES, LOGARITHMS, st.integers(0, 9), HOW)
def test_every_scale_is_its_blocks_largest_value_or_the_nearest_code_of_it(shape, log10, seed, how):
    weight = _weight(shape, log10, seed)
    # Blocks of different sizes, as the layers of a network have them.
    weight *= 10 ** torch.linspace(-2, 0, weight.numel()).view(shape)
    absmax = torch.stack([part.abs().max() for part in weight.flatten().split(how["block_size"])])
    quantised = quantise(weight, **how)
    if not how["double_quantisation"]:
        assert torch.equal(quantised.scales, absmax)
        assert quantised.nested_scales is quantised.offset is None
        return
    torch.testing.assert_close(quantised.offset, absmax.mean())
    wanted = (absmax - quantised.offset) / quantised.nested_scales.repeat_interleave(NESTED_BLOCK)[: len(absmax)]
    distances = (wanted.nan_to_num()[:, None] - dynamic8()).abs()
    chosen = distances.gather(1, quantised.scales.long()[:, None])[:, 0]
    assert (chosen <= distances.amin(dim=1) + 1e-5).all()


@given(SHAPES, LOGARITHMS, st.integers(0, 9), HOW)
def test_what_comes_back_is_code_times_scale(shape, log10, seed, how):
    quantised = quantise(_weight(shape, log10, seed), **how)
    by_element = _scales(quantised).repeat_interleave(how["block_size"])[: shape[0] * shape[1]]
    wanted = (codebook(how["storage"])[_codes(quantised)] * by_element).view(shape)
    assert torch.equal(dense(quantised), wanted)
    assert torch.equal(dense(quantised, torch.bfloat16), wanted.to(torch.bfloat16)), "multiplied in fp32, rounded once"


@given(SHAPES, st.data(), HOW)
def test_any_panel_of_rows_equals_those_of_the_whole(shape, data, how):
    """In a buffer that held other rows before."""
    quantised = quantise(_weight(shape), **how)
    whole = dense(quantised)
    for _ in range(3):
        first = data.draw(st.integers(0, shape[0] - 1))
        last = data.draw(st.integers(first + 1, shape[0]))
        for dtype in (torch.float32, torch.float16):
            assert torch.equal(expand(quantised, first, last, dtype), whole[first:last].to(dtype))


@given(SHAPES, st.integers(0, 9), HOW)
def test_a_zero_is_kept_as_zero(shape, seed, how):
    """Above all in a block of zeros, whose scale comes back from its 8-bit code as not quite zero."""
    weight, block = _weight(shape, seed=seed), how["block_size"]
    flat = weight.view(-1)
    flat[: block * (len(flat) // block // 2)] = 0
    flat[::3] = 0
    assert (dense(quantise(weight, **how))[weight == 0] == 0).all()
    assert torch.equal(dense(quantise(torch.zeros(shape), **how)), torch.zeros(shape))


@given(SHAPES, HOW, st.integers(1, 3))
def test_a_weight_is_quantised_chunk_by_chunk_with_the_same_result(shape, how, blocks):
    weight = _weight(shape)
    wanted = quantise(weight, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_CHUNK", blocks * how["block_size"])
        _same(quantise(weight, **how), wanted)


def test_a_weight_that_does_not_lie_in_one_piece():
    """As a Conv1D's, transposed."""
    weight = _weight((70, 30))
    _same(quantise(weight.t()), quantise(weight.t().contiguous()))


@pytest.mark.parametrize("storage", CODE_BITS)
def test_a_block_too_small_to_divide_by_is_finite(storage):
    """1 / absmax overflows there, and 0 · ∞ would be NaN, whose code is the largest value."""
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[1] = 1e-40, 1.0
    assert (dense(quantise(weight, storage=storage))[0, 1:] == 0).all()


@pytest.mark.parametrize(("storage", "least", "most"), [
    ("nf4", 0.0075, 0.0095), ("fp4", 0.014, 0.018), ("int4", 0.0105, 0.0135), ("int8", 3e-5, 4.5e-5),
])  # fmt: skip
def test_how_far_off_a_network_like_weight_is(storage, least, most):
    """NF4's published error on normal weights; a wrong table, block or scale is much further off."""
    weight = _weight((256, 256), -1.5)
    error = (dense(quantise(weight, storage=storage)) - weight).square().mean() / weight.square().mean()
    assert least < float(error) < most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_quantised_as_their_fp32_values(dtype):
    weight = _weight((3, 50)).to(dtype)
    _same(quantise(weight), quantise(weight.float()))


@pytest.mark.parametrize("storage", CODE_BITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named(storage, value):
    weight = _weight((3, 50))
    weight[1, 7] = value
    with pytest.raises(
        ModelError,
        match=rf"^layers\.0\.q_proj\.weight holds a value that is not finite, so it cannot be kept as {storage}\.$",
    ):
        quantise(weight, "layers.0.q_proj.weight", storage=storage)
