"""How many threads torch gets, how they wait, and how much they remember, settled before torch loads; after that none
of it can be changed.

Threads that wait for work spin. That is faster as long as the cores are free; beside another busy process a thread that
spins takes the core from the one that is waited for. So they spin for a short while, and then sleep.

oneDNN compiles a product for the sizes of its matrices, and it and torch remember the last 1,024 of them, each up to
0.8 MB. Where each step's rows have another length a step needs about ten, again for each layer, and none of those of
the steps before.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from veneer.control_groups import control_groups

THREADS, SPINNING = "OMP_NUM_THREADS", "GOMP_SPINCOUNT"
_SPINS = "2000"  # turns of the waiting loop; where nothing is set, GCC's runtime takes 300,000
_ALSO_SPINNING = "OMP_WAIT_POLICY"
_REMEMBERED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}  # products
_settled = False


def cores() -> int:
    """The cores that this process may really use: those it is bound to, as far as its control groups pay for them."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_quota(group) for group in control_groups("cpu"))
    return max(1, min([bound, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def _quota(group: Path) -> float | None:
    """Cores' worth of time that a control group has (its version 2, or 1); None where there is no limit."""
    try:
        if (group / "cpu.max").is_file():
            limit, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            limit, period = ((group / f"cpu.cfs_{of}_us").read_text().strip() for of in ("quota", "period"))
        return None if limit == "max" or int(limit) <= 0 else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def wanted() -> int:
    """The threads that torch gets: as many as the user says, else one a core."""
    said = os.environ.get(THREADS, "")
    return int(said) if said.isdigit() and int(said) else cores()


def settle() -> None:
    """Set what the user has not set. Once torch is loaded nothing is set, for it would change nothing."""
    global _settled
    if "torch" in sys.modules:
        return
    _settled = True
    os.environ.setdefault(THREADS, str(cores()))
    for name, count in _REMEMBERED.items():
        os.environ.setdefault(name, count)
    if _ALSO_SPINNING not in os.environ:
        os.environ.setdefault(SPINNING, _SPINS)


def settled() -> bool:
    """Whether this process is Veneer's own: it began with `settle`, before anything that needs torch."""
    return _settled


def said() -> list[str]:
    """A sentence when the user's own number of threads is not that of the cores."""
    threads, here = wanted(), cores()
    if threads == here:
        return []
    if threads < here:
        return [f"{THREADS} is set to {threads}: {threads} of {here} cores work."]
    return [f"{THREADS} is set to {threads}: so many threads on {here} cores wait for each other."]
