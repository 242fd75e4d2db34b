"""Amounts that a message compares have, as printed, the order of their bytes."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from veneer.units import amount, compared

pytestmark = pytest.mark.unit

SIZES = st.integers(0, 10**13)
NEAR = st.integers(-(10**7), 10**7)


def _read(text):
    number, unit = text.replace(",", "").split()
    return round(float(number) * {"GB": 10**9, "MB": 10**6}[unit])


@given(bound=SIZES, sizes=st.lists(SIZES), nearby=st.lists(NEAR))
@example(8_000_000_000, [], [1, 0, -1])
@example(1_000_000_000, [], [-1, -40_000, 4_000_000])
@example(999_960_000, [], [50_000, 10**7])
def test_what_fits_never_prints_a_larger_number_and_what_does_not_always_prints_one(bound, sizes, nearby):
    all_sizes = [*sizes, *(max(0, bound + more) for more in nearby)]
    limit, *printed = map(_read, compared(bound, *all_sizes))
    for size, number in zip(all_sizes, printed, strict=True):
        assert (number > limit) == (size > bound), (size, bound)


@pytest.mark.parametrize(
    ("bound", "sizes", "printed"),
    [
        (8 * 10**9, (8_474_000_000,), ["8.00 GB", "8.47 GB"]),
        (8 * 10**9, (8 * 10**9,), ["8.00 GB", "8.00 GB"]),
        (7_999_000_000, (8_001_000_000, 7_998_000_000), ["7.999 GB", "8.001 GB", "7.998 GB"]),
        (402 * 10**6, (402_010_000,), ["402.00 MB", "402.01 MB"]),
        (2_000_000_000, (700_000_000,), ["2.00 GB", "700.0 MB"]),
    ],
)
def test_there_are_as_many_digits_as_that_takes(bound, sizes, printed):
    assert compared(bound, *sizes) == printed
    assert amount(bound) == compared(bound)[0]
