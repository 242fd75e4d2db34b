"""What a run's numbers say of its learning: whether its loss was still falling steeply at the end, and whether its
accuracy is more than naming one class reaches. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

_FEWEST = 16  # steps; of fewer nothing is said
_AT_LEAST = 8  # points of the end, which is the last quarter
_AT_MOST = 100  # points; a longer end is read in so many means, since all pairs are compared
_PACE = 0.4  # of the whole run's mean fall a step
_LEVEL = 0.02  # of the loss where the end begins
_Z = 2.33  # of a normal distribution: 1 % is beyond


def above_largest(share: float, largest: float) -> bool:
    """Whether the ``share`` of right rows is above ``largest``, that of the largest class, which always naming it would
    reach. All rows right are enough where they have one class."""
    return share > largest or share == 1.0


@dataclass(frozen=True)
class Fall:
    """The end of a curve that was still falling: its fitted loss at the first and last of its ``steps`` steps."""

    steps: int
    first: float
    last: float


def still_falling(losses: Sequence[float]) -> Fall | None:
    """The fall at the end of ``losses``, one a step, where it is steep; else None.

    The end is the last quarter, at least 8 steps. It falls steeply where all three are true:

    1. It falls, by Mann and Kendall's test at 1 %: the signs of all pairs' differences, so that neither the size of
       single losses nor their distribution matters. Losses of batches scatter, and one bad batch must decide nothing.
    2. Its pace, Theil and Sen's slope (the median of all pairs' slopes), is at least 0.4 of the whole run's mean pace.
       A straight line keeps its pace (1), an exponential that has half its run as time constant ends at 0.4, one that
       has a quarter of it, or the tail of a cosine schedule, far below: such a curve has flattened.
    3. Over the end it falls by at least 2 % of the loss there: less is seen by a test, but is no gain.
    """
    if len(losses) < _FEWEST or not all(map(math.isfinite, losses)):
        return None
    steps = max(_AT_LEAST, len(losses) // 4)
    width = -(-steps // _AT_MOST)  # steps of a point
    points = [fmean(losses[stop - width : stop]) for stop in range(len(losses), len(losses) - steps, -width)][::-1]
    pairs = [(b - a, losses_b - losses_a) for (a, losses_a), (b, losses_b) in combinations(enumerate(points), 2)]
    slope = median(rise / run for run, rise in pairs) / width  # a step
    middle = median(points)
    first, last = middle - slope * (steps - 1) / 2, middle + slope * (steps - 1) / 2
    start = median(losses[: max(3, len(losses) // 20)])
    whole = (start - last) / len(losses)
    falls = _score([rise for _, rise in pairs], len(points)) < -_Z
    steep = -slope >= _PACE * whole > 0 and first - last >= _LEVEL * abs(first)
    return Fall(steps, first, last) if falls and steep else None


def _score(rises: Sequence[float], count: int) -> float:
    """Kendall's S over all pairs of ``count`` points, as a standard normal value under no trend, with the correction
    for continuity."""
    s = sum((rise > 0) - (rise < 0) for rise in rises)
    spread = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return (s - math.copysign(1, s)) / spread if s else 0.0
