"""The tables against their published definitions."""

from __future__ import annotations

import pytest
import torch

from veneer.frozen.codebook import dynamic8, nf4, nf4_from_definition

pytestmark = pytest.mark.unit


def test_nf4_is_the_normal_distributions_quantiles():
    table = nf4()
    assert (table.dtype, table.shape) == (torch.float32, (16,))
    torch.testing.assert_close(table.double(), nf4_from_definition(), rtol=0, atol=2e-7)
    assert (table.diff() > 0).all(), "the search for the nearest one needs them ascending"
    assert table[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0], "zero and the largest weight are kept exactly"


def test_the_dynamic_map_has_more_values_near_zero():
    table = dynamic8()
    assert (table.dtype, table.shape) == (torch.float32, (256,))
    assert (table.diff() > 0).all()
    assert table[127] == 0
    assert table[-1] == 1
    # Each decimal exponent has twice the steps of the one below it; every value but 0 and 1 has its negative.
    counts = [int(((table > 10.0**e) & (table < 10.0 ** (e + 1))).sum()) for e in range(-7, 0)]
    assert counts == [1, 2, 4, 8, 16, 32, 64]
    assert torch.equal(table[:127], -table[128:-1].flip(0))
    assert table[128] == pytest.approx(0.55e-6)
