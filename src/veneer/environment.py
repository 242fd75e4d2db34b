"""What something was made with: versions and machine. No torch here."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from veneer.documents import read_json

_ON_WHICH_BITS_DEPEND = ("device", "gpu", "processor", "threads", "torch", "transformers", "veneer")


def environment(threads: int) -> dict[str, Any]:
    """Name → version or value. ``threads``: torch's, which are not asked for here."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB",
        "threads": threads,
        **{name: version(name) for name in ("veneer", "torch", "transformers", "safetensors", "datasets")},
    }


def changed(file: Path, now: dict[str, Any]) -> list[str]:
    """What of ``now``, on which the bits of a result depend, is other than in the ``file`` of an earlier `environment`,
    as a sentence; none where nothing is, or there is no such file."""
    try:
        before = read_json(file)
        differing = [name for name in _ON_WHICH_BITS_DEPEND if name in now and before.get(name, now[name]) != now[name]]
    except (OSError, ValueError, AttributeError):
        return []
    if not differing:
        return []
    said = "; ".join(f"{name}: {before[name]}, and now {now[name]}" for name in differing)
    return [f"The run began elsewhere ({said}), so the last bits of its result may differ."]


def processor() -> str:
    """The processor's name, where the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
