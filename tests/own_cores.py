"""Where tests run in several processes, each has cores of its own: imported before torch, which counts them.

A process that shares its cores with another waits for threads that wait for theirs. No number of threads is set in the
environment: Veneer reports one that the user has set.
"""

from __future__ import annotations

import os


def _kept(number: int, count: int, cores: list[int]) -> list[int]:
    """Those of process ``number`` of ``count``: two processes on five cores have three and two."""
    return cores[number % len(cores) :: count]


def keep() -> frozenset[int]:
    """Bind this process, if it is one of several, to cores of its own; the cores that it had before."""
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    cores = os.sched_getaffinity(0)
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", ""), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "")
    if worker:
        os.sched_setaffinity(0, _kept(int(worker.removeprefix("gw")), int(count), sorted(cores)))
    return frozenset(cores)


ALL = keep()
