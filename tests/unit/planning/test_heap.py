"""The blocks of a step, replayed: gradients stay for the next pass, the optimizer's states for the next step."""

from __future__ import annotations

import pytest

from veneer.kernels import cpu
from veneer.planning import heap
from veneer.planning.heap import heap_peak
from veneer.planning.ledger import Event, Stretch

pytestmark = [pytest.mark.unit, pytest.mark.skipif(bool(cpu.MISSING), reason=f"no extension: {cpu.MISSING}")]

MB = 2**20


@pytest.fixture(autouse=True)
def _as_in_a_process_of_our_own(monkeypatch):
    monkeypatch.setattr(heap, "own_heap", lambda: True)


def _stretches(*events):
    return [Stretch("forward", events=[Event(block, size) for block, size in events])]


def test_a_step_takes_what_is_there_at_a_time_and_the_states():
    step = _stretches((1, 4 * MB), (2, 2 * MB), (1, 0), (3, MB), (2, 0))  # the third is a gradient
    assert heap_peak(step, passes=1, states=0) == 6 * MB
    # Each of the two moments takes the place of an activation or stands behind them.
    assert 14 * MB <= heap_peak(step, passes=1, states=8 * MB) <= 16 * MB


def test_a_gradient_of_the_pass_before_stays():
    step = _stretches((1, 4 * MB), (2, MB), (1, 0))
    assert heap_peak(step, passes=1, states=0) == 5 * MB
    assert heap_peak(step, passes=3, states=0) == 6 * MB


def test_a_hole_that_nothing_fits_into_is_held():
    step = _stretches((1, MB), (2, 2 * MB), (1, 0), (3, 2 * MB), (2, 0), (3, 0))
    assert heap_peak(step, passes=1, states=0) == 5 * MB


def test_small_blocks_lie_elsewhere_and_leave_no_holes():
    step = _stretches((1, MB), (2, 1000), (3, MB), (1, 0), (3, 0), (4, 2 * MB), (4, 0))
    assert heap_peak(step, passes=1, states=0) == 2 * MB + 1000


def test_where_it_is_the_systems_heap_it_is_not_foreseen(monkeypatch):
    monkeypatch.setattr(heap, "own_heap", lambda: False)
    assert heap_peak(_stretches((1, MB)), passes=1, states=0) == 0
