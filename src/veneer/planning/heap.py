"""glibc's heap, as far as it decides what a process's memory is: which holes a block can take, and what grows.

PyTorch asks for blocks that begin at a multiple of 64 bytes. Such a block is cut out of a piece that is 96 bytes longer,
and what is left before and behind it goes to small objects: in the forward pass to the graph's, which live as long as
the activations. So a hole that a block leaves does not take another one of the same size, and the heap grows by it
(malloc/malloc.c, _int_memalign).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from veneer.planning.ledger import Event

_ALIGNMENT, _HEADER, _SMALLEST = 64, 16, 32  # bytes
_SLACK = _ALIGNMENT + _SMALLEST
_LARGE = 32 * 2**20  # bytes of a block that is mapped by itself, and given back when it goes
_SMALL = 1024  # bytes of a block that any hole takes
_TOP = 128 * 2**10  # bytes that the heap grows by at least
_PAGE = 4096


class Heap:
    """Blocks in one growing piece of memory; `size` is what the process holds, `peak` the largest it has been."""

    def __init__(self) -> None:
        self.peak = 0
        self.pinning = False  # whether what is left beside a block is taken at once
        self._top = self._end = self._mapped = 0
        self._holes: list[tuple[int, int]] = []  # (size, start), ascending
        self._starts: dict[int, int] = {}  # of a hole → its size
        self._ends: dict[int, int] = {}  # of a hole → its start
        self._blocks: dict[tuple[int, int], tuple[int, int]] = {}  # (step, block) → start, size; start < 0: elsewhere
        self._pinned: list[tuple[int, int]] = []
        self._step = 0

    @property
    def size(self) -> int:
        return self._end + self._mapped

    def replay(self, events: Iterable[Event]) -> None:
        for event in events:
            if event.size:
                self._take((self._step, event.block), event.size)
            elif (self._step, event.block) in self._blocks:
                self._let_go((self._step, event.block))

    def take(self, size: int) -> None:
        """A block that stays."""
        if size:
            self._take((-1, len(self._blocks) + 1), size)

    def unpin(self) -> None:
        """The graph is gone, and with it what stood beside the blocks."""
        for start, size in self._pinned:
            self._free(start, size)
        self._pinned = []

    def next_step(self) -> None:
        """What is left of the step, its gradients, goes."""
        self.unpin()
        for key in [key for key in self._blocks if key[0] == self._step]:
            self._let_go(key)
        self._step += 1

    def _take(self, key: tuple[int, int], size: int) -> None:
        needed = -(-(size + _HEADER // 2) // _HEADER) * _HEADER
        if needed >= _LARGE:
            held = -(-(size + _PAGE) // _PAGE) * _PAGE
            self._blocks[key] = -1, held
            self._mapped += held
        elif needed < _SMALL:
            self._blocks[key] = -1, 0
        else:
            self._blocks[key] = self._cut(needed)
        self.peak = max(self.peak, self.size)

    def _cut(self, needed: int) -> tuple[int, int]:
        """Start and size of a block out of the smallest hole that it fits into with its slack, or out of the top."""
        room = needed + _SLACK
        place = bisect_left(self._holes, (room, 0))
        if place < len(self._holes):
            size, start = self._holes[place]
            self._fill(start)
            if size - room >= _SMALLEST:
                self._open(start + room, size - room)
            else:
                room = size
        else:
            start = self._top
            self._top += room
            if self._top > self._end:
                self._end = -(-(self._top + _TOP) // _PAGE) * _PAGE
        begin = -(-(start + _HEADER) // _ALIGNMENT) * _ALIGNMENT - _HEADER
        if begin != start and begin - start < _SMALLEST:
            begin += _ALIGNMENT
        behind = start + room - begin - needed
        if behind >= _SMALLEST:
            self._spare(begin + needed, behind)
        else:
            needed += behind
        if begin > start:
            self._spare(start, begin - start)
        return begin, needed

    def _let_go(self, key: tuple[int, int]) -> None:
        start, size = self._blocks.pop(key)
        if start >= 0:
            self._free(start, size)
        else:
            self._mapped -= size

    def _spare(self, start: int, size: int) -> None:
        if self.pinning:
            self._pinned.append((start, size))
        else:
            self._free(start, size)

    def _free(self, start: int, size: int) -> None:
        """A hole, one with the holes beside it; at the end of the heap the top begins earlier."""
        if start in self._ends:
            before = self._ends[start]
            size += self._starts[before]
            self._fill(before)
            start = before
        if start + size in self._starts:
            behind = start + size
            size += self._starts[behind]
            self._fill(behind)
        if start + size == self._top:
            self._top = start
            if self._end - self._top >= 2 * _LARGE:
                self._end = -(-(self._top + _TOP) // _PAGE) * _PAGE
            return
        self._open(start, size)

    def _open(self, start: int, size: int) -> None:
        self._starts[start], self._ends[start + size] = size, start
        insort(self._holes, (size, start))

    def _fill(self, start: int) -> None:
        size = self._starts.pop(start)
        del self._ends[start + size]
        self._holes.pop(bisect_left(self._holes, (size, start)))
