"""The memory that the system gives this process, and what of it is in use. No torch here."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from bisect import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.control_groups import control_groups
from veneer.unix import resource

if TYPE_CHECKING:
    from torch import Tensor

# A control group's files, version 2 or 1: its limit, what it uses, and a prefix of the names in memory.stat.
_VERSIONS = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
_SHARED = ("/dev/", "/memfd:", "/SYSV")  # what these files hold is nowhere else


def usable_host_memory() -> int:
    """Bytes that this process may have in all: what it has already, except for files' pages, which count as available;
    and what the system has available, or what its control group (version 2 or 1) or one of that one's parents leaves.
    All of these count files' pages so."""
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
    comes to its limit the system drops them as well, and MemAvailable counts them as available."""
    try:
        counts = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
        return sum(int(counts[f"{before}{which}_file"]) for which in ("inactive", "active"))
    except (OSError, ValueError, KeyError):
        return 0


def resident_memory() -> int:
    """This process's resident memory in bytes; 0 where the system does not say."""
    return _status("VmRSS:")


def peak_host_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    # Where the system reports it: the other counts that of the process which started this one, too.
    if peak := _status("VmHWM:"):
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def file_memory() -> int:
    """Bytes in memory of the files that this process has mapped."""
    return _status("RssFile:")


def anonymous_memory() -> int:
    """Bytes of this process's memory that belong to no file."""
    return resident_memory() - file_memory()


def return_memory() -> None:
    """Give the system what this process has freed: glibc kept 0.9 GB of a run that had ended."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def mapped_memory(tensors: Iterable[Tensor]) -> int:
    """Bytes of ``tensors`` that are pages of mapped files, whether they are in memory or not; 0 where the system does
    not say."""
    files = _mapped_files()
    starts = [start for start, _ in files]

    def mapped(tensor: Tensor) -> bool:
        before = bisect(starts, tensor.data_ptr())
        return before > 0 and tensor.data_ptr() < files[before - 1][1]

    return sum(tensor.nbytes for tensor in tensors if mapped(tensor))


def _mapped_files() -> list[tuple[int, int]]:
    """Where this process has mapped files, except for memory shared with others; from low to high."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    ranges = []
    for line in lines:
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and not "".join(path).startswith(_SHARED):
            start, end = (int(address, 16) for address in addresses.split("-"))
            ranges.append((start, end))
    return ranges


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith(field))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 0
