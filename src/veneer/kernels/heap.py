"""Where PyTorch's tensors are: in the extension's own heap (csrc/heap.h), which has no holes that cannot be used.

A command installs it once, at its start; in another's process nothing is replaced unless that asks for it.
"""

from __future__ import annotations

import os

from veneer.kernels.extension import MISSING
from veneer.threads import settled

if not MISSING:
    from veneer.kernels import _cpu

_installed = False


def installed() -> bool:
    """Whether new tensors of this process are in that heap. Asking changes nothing."""
    return _installed


def use_heap() -> str:
    """From now on new tensors of a page and more are in that heap, in all of this process; existing ones stay.

    Returns an empty string, or the reason why it is not so: the extension is missing, the system is not Linux, the user
    has put another allocator before the C library's (LD_PRELOAD), or does not want it (VENEER_HEAP=0).
    """
    global _installed
    if os.environ.get("VENEER_HEAP") == "0":
        return "VENEER_HEAP is 0"
    if MISSING:
        return f"the C++ kernels are missing: {MISSING}"
    reason = _cpu.use_heap()
    _installed = _installed or not reason
    return reason


def own_heap() -> bool:
    """Install that heap where the process is Veneer's own, as a command's is: called once, at the command's start.
    Returns whether it is installed."""
    return settled() and not use_heap()
