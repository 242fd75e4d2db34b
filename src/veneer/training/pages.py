"""Fixed-size pages of a scratch file, mapped into memory, of which a limited number is resident at any time.

The mapping is shared and backed by the file, so a page that is dropped loses nothing: its bytes are in the system's
file cache, and on the disk when the system needs that memory for something else. Where there is room, nothing is
written before its time; where there is none, the system writes and reclaims instead of killing.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from veneer.errors import TrainingError
from veneer.files import errors_of

AHEAD = 2  # pages that are on their way from the disk while one is worked on


class Pages:
    """``count`` pages of ``page_size`` bytes, zero at first, of which ``resident`` bytes may be in memory.

    ``page_size`` is a multiple of the system's own page; ``resident`` holds at least ``AHEAD + 1`` pages. The first
    pages that the budget has room for stay once they have come. The others pass through what is left: a step takes
    all pages in turn, and then the ones that were used last are those that are needed last.

    The file has no name in ``folder``, so no killed run leaves one, and none can be mistaken for a checkpoint; its room
    on the disk is taken at once, and given back when this object goes.

    Raises OSError when the disk has no room, TrainingError where the system cannot page by request.
    """

    def __init__(self, folder: Path, count: int, page_size: int, resident: int) -> None:
        if not hasattr(os, "posix_fallocate") or not hasattr(mmap, "MADV_DONTNEED"):
            raise TrainingError("The paged optimizer needs Linux (posix_fallocate, madvise); use optimizer: adamw.")
        self.page_size = page_size
        self._staying = count if count * page_size <= resident else resident // page_size - (AHEAD + 1)
        size = max(count, 1) * page_size
        with errors_of(Path(folder)), tempfile.TemporaryFile(dir=folder) as file:
            # A hole that is written to through a mapping on a full disk is a SIGBUS; an allocated block is not.
            os.posix_fallocate(file.fileno(), 0, size)
            self._map = mmap.mmap(file.fileno(), size)  # keeps the file after it is closed here
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def visit(self, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Each numbered page in turn, (page_size,) bytes to read and write until the next is asked for.

        The next ones are fetched meanwhile; one that does not stay is dropped afterwards.
        """
        for number in numbers[:AHEAD]:
            self._advise(number, mmap.MADV_WILLNEED)
        for place, number in enumerate(numbers):
            for coming in numbers[place + AHEAD : place + AHEAD + 1]:
                self._advise(coming, mmap.MADV_WILLNEED)
            start = number * self.page_size
            try:
                yield number, self._bytes[start : start + self.page_size]
            finally:
                self._advise(number, mmap.MADV_DONTNEED)

    def _advise(self, number: int, advice: int) -> None:
        if number >= self._staying:
            self._map.madvise(advice, number * self.page_size, self.page_size)


def page_size_within(resident: int, largest: int) -> int:
    """The page of at most ``largest`` bytes, a power of two, with which the window takes a quarter of ``resident``.

    Raises TrainingError when the budget is too small for pages of the system's own size.
    """
    smallest = 16 * mmap.PAGESIZE
    least = 4 * (AHEAD + 1) * smallest
    if resident < least:
        raise TrainingError(
            f"The paged optimizer cannot work within {resident / 1e6:.1f} MB; give it at least "
            f"{math.ceil(least / 1e6)}MB (optimizer_memory)."
        )
    size = smallest
    while size * 2 <= min(largest, resident // (4 * (AHEAD + 1))):
        size *= 2
    return size
