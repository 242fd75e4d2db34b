"""Whether other processes use the cores that this process needs, as the system counts it. No torch here."""

from __future__ import annotations

import os
import time
from pathlib import Path

from veneer.unix import resource

_STAT = Path("/proc/stat")
_BUSY = (0, 1, 2, 5, 6, 7)  # of a core's counts: user, nice, system, interrupts (two kinds), and what a host took
_ENOUGH = 0.9  # of the cores that are needed: what a system does besides is no load


class HostLoad:
    """From here on, the time that this process's cores spend on others' work.

    >>> HostLoad().disturbs(1) in (True, False)
    True
    """

    def __init__(self) -> None:
        self._before = _counted()
        self._began = time.monotonic()

    def disturbs(self, cores: int) -> bool:
        """Whether fewer than ``cores`` were left for this process and the children that it has waited for; False where
        the system does not say."""
        if self._before is None or (now := _counted()) is None:
            return False
        (number, busy, own), (_, busy_before, own_before) = now, self._before
        seconds = time.monotonic() - self._began
        others = busy - busy_before - (own - own_before)
        others -= number / _ticks()  # for a count is behind by up to a tick
        return number * seconds - others < _ENOUGH * min(cores, number) * seconds


def _counted() -> tuple[int, float, float] | None:
    """How many cores this process may use, the seconds for which they were busy, and the seconds of them that were this
    process's and its children's; None where the system does not say."""
    try:
        lines = [line.split() for line in _STAT.read_text(encoding="utf-8").splitlines() if line.startswith("cpu")]
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        counts = [[int(word) for word in words] for name, *words in lines if name in mine]
        ticks = sum(numbers[place] for numbers in counts for place in _BUSY)
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    if not counts:
        return None
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return len(counts), ticks / _ticks(), sum(used.ru_utime + used.ru_stime for used in own)


def _ticks() -> int:
    """The system's counts of a second."""
    return os.sysconf("SC_CLK_TCK")
