"""glibc's heap, as far as it decides how much memory a process holds: which holes a block can take, and what grows.

PyTorch asks for blocks that begin at a multiple of 64 bytes. glibc cuts such a block out of a piece that is 96 bytes
longer, and frees what is left before and behind it (malloc/malloc.c, _int_memalign). In the forward pass some of these
splinters go to the graph's small objects, which live as long as the activations. Beside one of them the hole that a
block leaves is too small for another block of the same size, and the heap grows instead.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

from veneer.planning.ledger import Event

# Share of the splinters that small objects take; measured (benchmarks/plan.py). A layer that is computed again keeps no
# activations, and so fewer objects.
TAKEN, TAKEN_AGAIN = 0.7, 0.4
_PATIENCE = 2  # blocks after which it is settled whether one's splinters are taken: temporaries have gone by then
_ALIGNMENT, _HEADER, _SMALLEST = 64, 16, 32  # bytes
_SLACK = _ALIGNMENT + _SMALLEST
_LARGE = 32 * 2**20  # bytes of a block that is mapped by itself, and given back when it goes
_SMALL = 1024  # bytes of a block that any hole takes
_TOP = 128 * 2**10  # bytes that the heap grows by at least
_PAGE = 4096

_Piece = tuple[int, int]  # start, size
_Key = tuple[int, int]  # step, block


class Heap:
    """Blocks in one growing piece of memory; `size` is what the process holds, `peak` the largest it has been.

    ``taken``: the share of the splinters that small objects take now. Which ones is chance; ``phase``, from 0 to 1, is
    one of its outcomes.
    """

    def __init__(self, phase: float = 0.0) -> None:
        self.peak = 0
        self.taken = 0.0
        self._top = self._end = self._mapped = self._step = 0
        self._holes: list[tuple[int, int]] = []  # (size, start), ascending
        self._starts: dict[int, int] = {}  # of a hole → its size
        self._ends: dict[int, int] = {}  # of a hole → its start
        self._blocks: dict[_Key, _Piece] = {}  # start < 0: not in the heap
        self._unsettled: deque[tuple[_Key, list[_Piece]]] = deque()
        self._taken: list[_Piece] = []
        self._due = phase  # splinters that are to be taken yet

    @property
    def size(self) -> int:
        return self._end + self._mapped

    def replay(self, events: Iterable[Event]) -> None:
        for event in events:
            key = self._step, event.block
            if event.size:
                self._take(key, event.size)
            elif key in self._blocks:
                self._let_go(key)

    def take(self, size: int) -> None:
        """A block that stays."""
        if size:
            self._take((-1, len(self._blocks)), size)

    def next_step(self) -> None:
        """The graph has gone, and with it its small objects; now what is left of the step goes, its gradients."""
        self._settle(0)
        for start, size in self._taken:
            self._free(start, size)
        self._taken = []
        for key in [key for key in self._blocks if key[0] == self._step]:
            self._let_go(key)
        self._step += 1

    def _take(self, key: _Key, size: int) -> None:
        needed = -(-(size + _HEADER // 2) // _HEADER) * _HEADER
        if needed >= _LARGE:
            held = -(-(size + _PAGE) // _PAGE) * _PAGE
            self._blocks[key] = -1, held
            self._mapped += held
        elif needed < _SMALL:
            self._blocks[key] = -1, 0
        else:
            self._blocks[key], splinters = self._cut(needed)
            self._unsettled.append((key, splinters))
            self._settle(_PATIENCE)
        self.peak = max(self.peak, self.size)

    def _cut(self, needed: int) -> tuple[_Piece, list[_Piece]]:
        """A block out of the smallest hole that it fits into with its slack, or out of the top; and its splinters."""
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
        if start < begin < start + _SMALLEST:
            begin += _ALIGNMENT
        behind = start + room - begin - needed
        splinters = [(start, begin - start)] if begin > start else []
        if behind >= _SMALLEST:
            splinters.append((begin + needed, behind))
        else:
            needed += behind
        return (begin, needed), splinters

    def _settle(self, patience: int) -> None:
        while len(self._unsettled) > patience:
            key, splinters = self._unsettled.popleft()
            for start, size in splinters:
                if key in self._blocks:
                    self._due += self.taken
                if self._due >= 1:
                    self._due -= 1
                    self._taken.append((start, size))
                else:
                    self._free(start, size)

    def _let_go(self, key: _Key) -> None:
        start, size = self._blocks.pop(key)
        if start >= 0:
            self._free(start, size)
        else:
            self._mapped -= size

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
        if start + size < self._top:
            self._open(start, size)
            return
        self._top = start
        if self._end - self._top >= 2 * _LARGE:
            self._end = -(-(self._top + _TOP) // _PAGE) * _PAGE

    def _open(self, start: int, size: int) -> None:
        self._starts[start], self._ends[start + size] = size, start
        insort(self._holes, (size, start))

    def _fill(self, start: int) -> None:
        size = self._starts.pop(start)
        del self._ends[start + size]
        self._holes.pop(bisect_left(self._holes, (size, start)))
