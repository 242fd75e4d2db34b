"""What this machine has: the memory that the process may use, and how fast it multiplies and moves numbers.

The rates are measured once, in a few seconds, and remembered in the user's cache folder, as frozen/compute.py does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from veneer.errors import ModelError
from veneer.kernels.dense import linear
from veneer.remembered import key_of, recall, remember

_FILE = "machine.json"
_CGROUP = Path("/sys/fs/cgroup")
_ONES = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def usable_memory() -> int:
    """Bytes that this process may have in all: what it has already, but for files' pages, which count as available; and
    what the system has available, or what its control group (version 2 or 1) leaves."""
    return min(_available(), _group(_CGROUP)) + resident_memory() - file_memory()


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group(root: Path) -> int:
    for limit, used in _ONES:
        try:
            most = (root / limit).read_text(encoding="utf-8").strip()
            if most != "max":
                return max(0, int(most) - int((root / used).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return sys.maxsize


def resident_memory() -> int:
    """Of this process, in bytes; 0 where the system does not tell."""
    return _status("VmRSS:")


def file_memory() -> int:
    """Of the files that this process has mapped, what is in memory, in bytes."""
    return _status("RssFile:")


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith(field))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 0


@dataclass(frozen=True)
class Machine:
    """Measured on this machine with torch's threads."""

    flops: float  # fp32 products, floating-point operations a second
    bandwidth: float  # bytes a second that a pass over a large tensor reads and writes
    operation: float  # seconds that an operation takes beside its arithmetic
    runtime: int  # bytes of a process that trains, without its model and what it makes of it


def measured(*, afresh: bool = False) -> Machine:
    """From the cache file, else (or ``afresh``) measured and put there; a file that cannot be written is no error."""
    if not afresh and (known := remembered()) is not None:
        return known
    found = _measure()
    remember(_FILE, _key(), asdict(found))
    return found


def remembered() -> Machine | None:
    """What was measured here before, with these versions and threads."""
    try:
        return Machine(**recall(_FILE, _key()))
    except TypeError:  # nothing, or of another version of this
        return None


def _key() -> str:
    return key_of(torch.__version__, torch.get_num_threads())


def _measure() -> Machine:
    x, weight = (torch.linspace(-1, 1, n * 1024).view(n, 1024) for n in (1024, 1024))
    product = _shortest(lambda: linear(linear(x, weight), weight.t()), 6)
    large = torch.zeros(2**24)
    other = torch.zeros(2**24)
    moved = _shortest(lambda: large.add_(other), 6)
    small = torch.zeros(16)
    overhead = _shortest(lambda: [small.add_(1) for _ in range(1000)], 3) / 1000
    return Machine(2 * 2 * 1024**3 / product, 3 * large.nbytes / moved, overhead, _runtime())


def _shortest(work: object, times: int) -> float:
    assert callable(work)
    found = []
    for _ in range(times + 1):  # the first one warms up
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def _runtime() -> int:
    """Of a process that trains a model of no size to speak of."""
    done = subprocess.run(
        [sys.executable, "-m", "veneer.planning.runtime"], capture_output=True, text=True, check=False
    )
    try:
        return int(done.stdout.split()[-1])
    except (IndexError, ValueError):
        raise ModelError(f"The memory of a process that trains could not be measured: {done.stderr[-500:]}") from None
