"""Whether a loss was still falling: curves whose ends are known."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from veneer.training.curve import above_largest, still_falling

pytestmark = pytest.mark.unit

LENGTHS = (16, 40, 100, 400, 2000)


def _curve(shape, steps, noise=0.0, seed=0):
    """``shape`` of the share of the run that is done, and normal noise."""
    draw = random.Random(seed)
    return [shape(step / steps) + draw.gauss(0, noise) for step in range(steps)]


def _cosine_tail(done):
    """An exponential in the sum of the rates so far, which a cosine schedule lets vanish."""
    return 0.5 + 2 * math.exp(-4 * (done + math.sin(math.pi * done) / math.pi))


@pytest.mark.parametrize("steps", LENGTHS)
def test_a_flat_curve_is_not_falling(steps):
    assert still_falling([1.0] * steps) is None


@pytest.mark.parametrize("steps", LENGTHS)
def test_noise_around_a_flat_curve_is_no_fall(steps):
    said = [still_falling(_curve(lambda done: 1.0, steps, 0.3, seed)) for seed in range(40)]
    assert sum(fall is not None for fall in said) <= 1, "the test is at 1 %"


@pytest.mark.parametrize("steps", LENGTHS)
def test_a_straight_fall_is_steep_and_fitted(steps):
    losses = _curve(lambda done: 3 - 2 * done, steps)
    fall = still_falling(losses)
    assert fall is not None
    assert fall.steps == max(8, steps // 4)
    assert fall.last == pytest.approx(losses[-1], abs=4 / steps * (1 + steps // 400))
    assert fall.first - fall.last == pytest.approx(2 * (fall.steps - 1) / steps, rel=1e-6)


@pytest.mark.parametrize("steps", [100, 400, 2000])
def test_a_noisy_fall_is_seen(steps):
    said = [still_falling(_curve(lambda done: 3 - 2 * done, steps, 0.1, seed)) for seed in range(20)]
    assert all(said)


@pytest.mark.parametrize("steps", LENGTHS)
def test_the_tail_of_a_cosine_schedule_has_flattened(steps):
    assert not any(still_falling(_curve(_cosine_tail, steps, noise)) for noise in (0.0, 0.05))


@pytest.mark.parametrize("steps", [100, 400])
def test_an_exponential_is_steep_by_its_time_constant(steps):
    assert still_falling(_curve(lambda done: 0.5 + 2 * math.exp(-1.5 * done), steps, 0.01))
    assert not still_falling(_curve(lambda done: 0.5 + 2 * math.exp(-4 * done), steps, 0.01))


def test_a_single_bad_batch_decides_nothing():
    falling = _curve(lambda done: 3 - 2 * done, 100)
    assert still_falling([*falling[:90], 50.0, *falling[91:]])
    assert still_falling([1.0] * 80 + [9.0] + [1.0] * 19) is None


def test_a_rise_a_short_run_and_no_number_say_nothing():
    assert still_falling(_curve(lambda done: 1 + done, 100, 0.05)) is None
    assert still_falling(_curve(lambda done: 3 - 2 * done, 15)) is None
    assert still_falling([]) is None
    assert still_falling([*_curve(lambda done: 3 - 2 * done, 30), math.nan]) is None


def test_a_fall_of_less_than_two_per_cent_is_none():
    assert still_falling(_curve(lambda done: 3 - 0.2 * done, 100)) is None
    assert still_falling(_curve(lambda done: 3 - 0.4 * done, 100))


def test_where_there_is_nothing_left_to_learn_it_is_not_falling():
    ends = (6, 0.01, 0.002, 0.001, 0.0001)
    losses = [a + (b - a) * i / 10 for a, b in pairwise(ends) for i in range(10)]
    assert still_falling(losses) is None


def test_an_accuracy_is_above_the_largest_class_or_not():
    assert above_largest(0.59, 0.58)
    assert not above_largest(0.58, 0.58)
    assert above_largest(1.0, 1.0), "of one class no more can be reached"
