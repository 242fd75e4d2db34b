"""What the heap of the kernels (csrc/heap.h) holds at most while a run takes its steps: the blocks of a step, replayed.

Its holes are what no block that is asked for next fits into.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from veneer.kernels.cpu import MISSING
from veneer.kernels.heap import own_heap
from veneer.planning.ledger import Event, Stretch

if not MISSING:
    from veneer.kernels import _cpu

_STEPS = 2  # the second has the optimizer's states, and the holes that the first one left


def heap_peak(stretches: Sequence[Stretch], passes: int, states: int) -> int:
    """Bytes, where a step is as many passes as said; a pass leaves its gradients, and the first step the optimizer's
    ``states``. 0 where the heap cannot be used: the system's is not foreseen."""
    if not own_heap():
        return 0
    events = [event for stretch in stretches for event in stretch.events]
    gone = {event.block for event in events if not event.size}
    gradients = {event.block: event.size for event in events if event.block not in gone}
    heap = _Heap(gradients)
    for number in range(_STEPS):
        for _ in range(passes):
            heap.replay(events)
        if not number:
            share = states / 2 / max(1, sum(gradients.values()))
            for size in gradients.values():  # two moments of each
                heap.take(int(share * size))
                heap.take(int(share * size))
        heap.let_gradients_go()
    return heap.peak


class _Heap:
    """Small blocks, which lie elsewhere, are counted by themselves."""

    def __init__(self, gradients: dict[int, int]) -> None:
        self._heap = _cpu.Heap(2**62)
        self._gradients = gradients
        self._blocks: dict[int, tuple[int, int]] = {}  # block → where it begins, and its size
        self._small = 0
        self.peak = 0

    def replay(self, events: Iterable[Event]) -> None:
        """One pass; gradients of an earlier one stay, and this one's are added to them."""
        added = self._gradients.keys() & self._blocks.keys()
        for event in events:
            if event.block in added:
                self._let_go(*self.take(event.size))
            elif event.size:
                self._blocks[event.block] = self.take(event.size)
            else:
                self._let_go(*self._blocks.pop(event.block))

    def take(self, size: int) -> tuple[int, int]:
        start = 0
        if size < _cpu.Heap.least:
            self._small += size
        else:
            start = self._heap.take(size)
        self.peak = max(self.peak, self._heap.held + self._small)
        return start, size

    def let_gradients_go(self) -> None:
        for block in self._gradients.keys() & self._blocks.keys():
            self._let_go(*self._blocks.pop(block))

    def _let_go(self, start: int, size: int) -> None:
        if size < _cpu.Heap.least:
            self._small -= size
        else:
            self._heap.let_go(start)
