"""Where PyTorch's tensors lie: in the extension's own heap (csrc/heap.h), which has no holes that cannot be used."""

from __future__ import annotations

import os

from veneer.kernels.extension import MISSING
from veneer.threads import settled

if not MISSING:
    from veneer.kernels import _cpu


def use_heap() -> str:
    """From now on new tensors of a page and more lie in that heap, in all of this process; those that are there stay.

    Why it is not so: without the extension, on other systems than Linux, where the user has put another allocator
    before the C library's (LD_PRELOAD), or does not want it (VENEER_HEAP=0). Else an empty string.
    """
    if os.environ.get("VENEER_HEAP") == "0":
        return "VENEER_HEAP is 0"
    if MISSING:
        return f"the C++ kernels are missing: {MISSING}"
    return _cpu.use_heap()


def own_heap() -> bool:
    """Use that heap where the process is Veneer's own, as the command's is; in another's nothing is replaced unless
    that calls `use_heap` itself. Whether it is used."""
    return settled() and not use_heap()
