"""What the heap of the kernels (csrc/heap.h) holds at most while a run takes its steps: the blocks of a step, replayed.

Its holes are what no block that is asked for next fits into.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from veneer.kernels.cpu import MISSING
from veneer.planning.ledger import Event, Stretch

if not MISSING:
    from veneer.kernels import _cpu

_STEPS = 2  # the second has the optimizer's states, and the holes that the first one left


def heap_peak(stretches: Sequence[Stretch], passes: int, states: int) -> int:
    """Bytes, where a step is as many passes as said; a pass leaves its gradients, and the first step the optimizer's
    ``states``. 0 without the extension: then it is the system's heap, which is not foreseen."""
    if MISSING:
        return 0
    events = [event for stretch in stretches for event in stretch.events]
    heap = _Heap({event.block for event in events} - {event.block for event in events if not event.size})
    for number in range(_STEPS):
        for _ in range(passes):
            heap.replay(events)
        if states and not number:
            heap.keep(states)
        heap.let_gradients_go()
    return heap.peak


class _Heap:
    def __init__(self, gradients: set[int]) -> None:
        self._heap = _cpu.Heap(2**62)
        self._gradients = gradients
        self._blocks: dict[int, int] = {}  # block → where it begins
        self.peak = 0

    def replay(self, events: Iterable[Event]) -> None:
        """One pass; gradients of an earlier one stay, and this one's are added to them."""
        added = self._gradients & self._blocks.keys()
        for event in events:
            if event.block in added:
                self._heap.let_go(self.keep(event.size))
            elif event.size:
                self._blocks[event.block] = self.keep(event.size)
            else:
                self._heap.let_go(self._blocks.pop(event.block))

    def keep(self, size: int) -> int:
        start = self._heap.take(size)
        self.peak = max(self.peak, self._heap.held)
        return start

    def let_gradients_go(self) -> None:
        for block in self._gradients & self._blocks.keys():
            self._heap.let_go(self._blocks.pop(block))
