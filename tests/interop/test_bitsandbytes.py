"""Our 4-bit weights against the installed bitsandbytes."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.frozen.blockwise import BLOCK, NESTED_BLOCK, expand, quantise, scales
from veneer.frozen.codebook import dynamic8, nf4

logging.disable(logging.WARNING)  # it warns at its import of GPU kernels that are not here
functional = pytest.importorskip("bitsandbytes.functional")
logging.disable(logging.NOTSET)

pytestmark = pytest.mark.interop


def _weight(shape, log10=0.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**log10


def _theirs(weight, nested=True):
    return functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=nested)


def test_the_tables_are_theirs():
    assert torch.equal(nf4(), _theirs(torch.ones(1, BLOCK))[1].code)
    torch.testing.assert_close(dynamic8(), functional.create_dynamic_map().sort().values, rtol=0, atol=1e-7)


@settings(max_examples=60)
@given(st.tuples(st.integers(1, 40), st.integers(1, 200)), st.floats(-4, 2), st.integers(0, 9))
def test_the_codes_are_theirs_bit_for_bit(shape, log10, seed):
    weight = _weight(shape, log10, seed)
    codes, _ = _theirs(weight)
    assert torch.equal(quantise(weight).codes, codes.flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_are_those_of_half_precision_weights(dtype):
    weight = _weight((300, 257), -1.7).to(dtype)
    codes, _ = _theirs(weight)
    assert torch.equal(quantise(weight).codes, codes.flatten())


def test_the_scales_are_theirs_but_for_the_few_that_their_table_rounds_to_a_neighbour():
    """On a CPU they look the 8-bit code up in 65,536 bins; ours is the nearest code itself."""
    ours = quantise(_weight((1024, 1024), -1.7))
    _, state = _theirs(_weight((1024, 1024), -1.7))
    torch.testing.assert_close(ours.offset, state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.scale_scales, state.state2.absmax, rtol=1e-5, atol=0)
    different = ours.scale_codes != state.absmax
    assert different.float().mean() < 0.01
    assert ((ours.scale_codes.int() - state.absmax.int()).abs() <= 1).all()
    # Where the two differ, ours is the nearer one.
    _, plain = _theirs(_weight((1024, 1024), -1.7), nested=False)
    wanted = (plain.absmax - ours.offset) / ours.scale_scales.repeat_interleave(NESTED_BLOCK)
    distance, theirs = ((dynamic8()[codes.int()] - wanted).abs() for codes in (ours.scale_codes, state.absmax))
    assert (distance <= theirs + 1e-6).all()


@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (40, 192), (512, 576)])
def test_what_comes_back_is_what_they_give_back(shape):
    """From the same codes and scales, so that the scales' rounding plays no part.

    Only for rows of whole blocks: their CPU kernel takes the end of a row for that of a block, and gives another
    weight back than it was given (0.50.2; the error of a 6 × 96 weight is 22 % instead of 9).
    """
    weight = _weight(shape)
    codes, state = _theirs(weight, nested=False)
    ours = expand(quantise(weight), state.absmax, 0, shape[0], torch.float32)
    assert torch.equal(ours, functional.dequantize_4bit(codes, state))


def test_the_whole_round_trip_is_as_near_to_the_weight_as_theirs():
    weight = _weight((512, 512), -1.7)
    quantised = quantise(weight)
    ours = expand(quantised, scales(quantised), 0, 512, torch.float32)
    theirs = functional.dequantize_4bit(*_theirs(weight))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * float(weight.abs().max()))
    assert (ours - weight).norm() <= (theirs - weight).norm() * 1.0001
