"""What this machine has: the memory that the process may use, and how fast it does each kind of operation.

The rates are measured once, in less than a minute, and remembered in the user's cache folder, as frozen/compute.py
does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from bisect import bisect
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from veneer.control_groups import control_groups
from veneer.errors import ModelError
from veneer.planning.ledger import KINDS
from veneer.remembered import machine_key, recall, remember

_FILE = "machine.json"
# Of a control group, version 2 or 1: its limit, what it uses, and before the names of memory.stat.
_VERSIONS = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
_SHARED = ("/dev/", "/memfd:", "/SYSV")  # what these files hold is nowhere else


def usable_memory() -> int:
    """Bytes that this process may have in all: what it has already, but for files' pages, which count as available; and
    what the system has available, or what its control group (version 2 or 1) or one of that one's parents leaves. All
    of these count files' pages so."""
    left = (_left(group) for group in control_groups("memory"))
    return min(_available(), *left) + anonymous_memory()


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left(group: Path) -> int:
    for limit, used, before in _VERSIONS:
        try:
            most = (group / limit).read_text(encoding="utf-8").strip()
            if most != "max":
                taken = int((group / used).read_text(encoding="utf-8"))
                return max(0, int(most) - taken + _cache(group / "memory.stat", before))
        except (OSError, ValueError):
            continue
    return sys.maxsize


def _cache(stat: Path, before: str) -> int:
    """Bytes of files' pages that a control group has in memory. Those in use lately (active) count, too: when the group
    comes to its limit the system drops them as well, and MemAvailable takes them to be available."""
    try:
        found = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
        return sum(int(found[f"{before}{which}_file"]) for which in ("inactive", "active"))
    except (OSError, ValueError, KeyError):
        return 0


def resident_memory() -> int:
    """Of this process, in bytes; 0 where the system does not tell."""
    return _status("VmRSS:")


def file_memory() -> int:
    """Of the files that this process has mapped, what is in memory, in bytes."""
    return _status("RssFile:")


def anonymous_memory() -> int:
    """Of this process, what is no file's, in bytes."""
    return resident_memory() - file_memory()


def return_memory() -> None:
    """Give the system what this process has let go: of a run that had ended glibc kept 0.9 GB."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def mapped_memory(tensors: Iterable[Tensor]) -> int:
    """Bytes of ``tensors`` that are pages of mapped files, whether they are in memory or not; 0 where the system does
    not tell."""
    files = _mapped_files()
    starts = [start for start, _ in files]

    def mapped(tensor: Tensor) -> bool:
        before = bisect(starts, tensor.data_ptr())
        return before > 0 and tensor.data_ptr() < files[before - 1][1]

    return sum(tensor.nbytes for tensor in tensors if mapped(tensor))


def _mapped_files() -> list[tuple[int, int]]:
    """Where this process has mapped files, but for those that are memory shared with others; from low to high."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and not "".join(path).startswith(_SHARED):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append((start, end))
    return found


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
    return f"{machine_key(torch.__version__, torch.get_num_threads())}, {made_with}"


def _measure() -> Machine:
    """By a process of its own (rates.py): its memory is a run's, and nothing of this one is in its way."""
    done = subprocess.run([sys.executable, "-m", "veneer.runs.measure"], capture_output=True, text=True, check=False)
    try:
        return Machine(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        raise ModelError(f"This machine's rates could not be measured: {done.stderr[-500:]}") from None
