"""The C++ extension (csrc/): its variants that this machine runs, and which one is chosen.

The extension has no OpenMP runtime of its own. Two in one process, both spinning for work, cost milliseconds a call; it
uses the one that torch has loaded, and as many threads as torch does.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from veneer.errors import ConfigError

VARIABLE = "VENEER_KERNELS"
REFERENCE = "reference"  # chosen: plain PyTorch

# torch loads its runtime for all to see; where a build of it does not, its symbols are made visible here.
for _runtime in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
    ctypes.CDLL(str(_runtime), mode=ctypes.RTLD_GLOBAL)

try:
    from veneer.kernels import _cpu

    VARIANTS = tuple(_cpu.variants())  # the fastest last
    MISSING = ""
except ImportError as error:
    VARIANTS = ()
    MISSING = "they were not built" if isinstance(error, ModuleNotFoundError) else str(error)


def chosen() -> str:
    """The fastest variant, or what VENEER_KERNELS names: a variant or "reference". Raises ConfigError when the machine
    cannot run it."""
    wanted = os.environ.get(VARIABLE)
    if wanted == REFERENCE or (not wanted and not VARIANTS):
        return REFERENCE
    if not wanted:
        return VARIANTS[-1]
    if wanted not in VARIANTS:
        able = ", ".join((REFERENCE, *VARIANTS))
        why = f" (no C++ kernels: {MISSING})" if MISSING else ""
        raise ConfigError(f"{VARIABLE} is {wanted!r}, which this machine cannot run. It can run {able}{why}.")
    return wanted


def has_tiles(variant: str) -> bool:
    """Whether a variant, one of VARIANTS, multiplies in bf16 by AMX tiles."""
    return bool(_cpu.has_tiles(variant))


CHOSEN = chosen()
