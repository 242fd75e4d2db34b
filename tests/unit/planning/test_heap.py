"""The heap never holds less than what is in it, gives back what it can, and its blocks never overlap."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.planning.heap import Heap
from veneer.planning.ledger import Event

pytestmark = pytest.mark.unit

MB = 2**20
SIZES = st.integers(1, 40 * MB)


@given(st.lists(st.tuples(SIZES, st.integers(0, 5)), max_size=40), st.sampled_from([0.0, 0.4, 1.0]))
def test_it_holds_what_is_in_it_and_no_two_blocks_overlap(steps, taken):
    heap = Heap()
    heap.taken = taken
    live: dict[int, int] = {}
    for number, (size, gone) in enumerate(steps):
        heap.replay([Event(number, size)])
        live[number] = size
        if gone in live:
            heap.replay([Event(gone, 0)])
            del live[gone]
        assert heap.size >= sum(size for size in live.values() if size >= 1024)
        pieces = sorted(piece for piece in heap._blocks.values() if piece[0] >= 0)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(pieces))
    heap.next_step()
    assert heap.size <= 64 * MB, "what the end of the heap keeps"
    assert heap.peak >= heap.size


def test_a_hole_takes_a_smaller_block_and_not_one_of_its_size_beside_a_small_object():
    heap = Heap()
    heap.taken = 1.0
    big, events = 4 * MB, []
    for number in range(8):
        events += [Event(2 * number, big), Event(2 * number + 1, MB)]
    heap.replay(events)
    before = heap.size
    heap.replay([Event(number, 0) for number in range(0, 16, 2)])
    heap.replay([Event(100 + number, big // 2) for number in range(8)])
    assert heap.size == before
    heap.replay([Event(200 + number, big) for number in range(8)])
    assert heap.size > before + 4 * big


def test_a_block_above_the_limit_comes_and_goes_by_itself():
    heap = Heap()
    heap.replay([Event(1, 40 * MB)])
    assert 40 * MB <= heap.size < 41 * MB
    heap.replay([Event(1, 0)])
    assert heap.size == 0
    assert heap.peak > 40 * MB
