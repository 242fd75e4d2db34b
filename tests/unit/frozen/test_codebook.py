"""The tables against their published definitions."""

from __future__ import annotations

import pytest
import torch

from veneer.frozen.codebook import codebook, dynamic8, levels8, nf4_from_definition, search

pytestmark = pytest.mark.unit


def test_nf4_is_the_normal_distributions_quantiles():
    table = codebook("nf4")
    assert (table.dtype, table.shape) == (torch.float32, (16,))
    torch.testing.assert_close(table.double(), nf4_from_definition(), rtol=0, atol=2e-7)
    assert (table.diff() > 0).all(), "the search for the nearest one needs them ascending"
    assert table[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0], "zero and the largest weight are kept exactly"


def test_fp4_is_a_float_of_two_exponent_bits_and_one_of_mantissa():
    """Its values in the order of the bit patterns, as bitsandbytes' documentation lists them."""
    sizes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3])
    assert torch.equal(codebook("fp4"), torch.cat([sizes, -sizes]) / 12)
    assert not torch.signbit(codebook("fp4")[8]), "there is one zero"


@pytest.mark.parametrize(("storage", "largest"), [("int4", 7), ("int8", 127)])
def test_the_integers_are_symmetric(storage, largest):
    assert codebook(storage).tolist() == [
        pytest.approx(i / largest, abs=1e-7) for i in range(-largest, largest + 1)
    ]  # fmt: skip
    assert codebook(storage)[largest] == 0


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int4", "int8", "dynamic8"])
def test_every_value_is_nearest_to_itself_and_a_tie_goes_to_the_lower_one(storage):
    table = dynamic8() if storage == "dynamic8" else codebook(storage)

    def nearest(values):
        places = torch.empty(len(values), dtype=torch.int32)
        return search(storage).nearest(values, places, torch.empty(len(values), dtype=torch.uint8))

    assert torch.equal(table[nearest(table).long()], table)
    ascending = table.unique()
    between = (ascending[:-1] + ascending[1:]) / 2
    assert torch.equal(table[nearest(between).long()], ascending[:-1])
    assert torch.equal(table[nearest(torch.tensor([-2.0, 2.0])).long()], ascending[[0, -1]])


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


@pytest.mark.parametrize(
    ("storage", "steps", "error"), [("nf4", 112, 0.0034), ("fp4", 120, 0.0024), ("int4", 70, 1e-7)]
)
def test_in_8_bits_a_codebook_is_the_nearest_integers_of_the_best_step(storage, steps, error):
    table = codebook(storage).double()
    levels, step = levels8(storage)
    assert (levels.dtype, tuple(levels.shape)) == (torch.int8, (16,))
    assert step == 1 / steps
    off = levels[: len(table)].double() * step - table
    assert off.abs().max() <= step / 2
    assert off.norm() <= error * table.norm()
    for other in range(64, 128):
        assert off.norm() <= ((table * other).round() / other - table).norm() + 1e-7
