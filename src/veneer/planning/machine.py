"""What this machine has: the memory that the process may use, and how fast it does each kind of operation.

The rates are measured once, in less than a minute, and remembered in the user's cache folder, as frozen/compute.py
does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from veneer.errors import ModelError
from veneer.planning.ledger import KINDS
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
    """Measured on this machine with torch's threads; without rates no time is told."""

    rates: dict[str, float]  # kind of operation → a second's floating-point operations of products, bytes of the others
    operation: float  # seconds that an operation takes beside its arithmetic
    runtime: int  # bytes of a process that trains, without its model and what it makes of it
    loading: int  # of one that has loaded a model


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
        known = Machine(**recall(_FILE, _key()))
    except TypeError:  # nothing, or of another version of this
        return None
    return known if set(KINDS) <= set(known.rates) else None


def _key() -> str:
    made_with = ", ".join(f"{name} {version(name)}" for name in ("transformers", "veneer"))  # the steps are theirs
    return f"{key_of(torch.__version__, torch.get_num_threads())}, {made_with}"


def _measure() -> Machine:
    """By a process of its own (rates.py): its memory is a run's, and nothing of this one is in its way."""
    done = subprocess.run([sys.executable, "-m", "veneer.planning.rates"], capture_output=True, text=True, check=False)
    try:
        return Machine(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        raise ModelError(f"This machine's rates could not be measured: {done.stderr[-500:]}") from None
