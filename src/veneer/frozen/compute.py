"""What a model computes in on this machine: fp32, or bf16 where a part of a real step was measured to be faster in it.

A processor without instructions for bf16 takes about nine times as long for a bf16 product as for an fp32 one: there
nothing is measured. Elsewhere a small program (runs/measure_compute.py) shows in a second, once for each of the ways in
which weights are kept, which type is faster; the measurement is kept in the user's cache folder.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from veneer.device import CPU, computes_bf16, is_host
from veneer.errors import ConfigError
from veneer.frozen.config import CODE_BITS, COMPUTES
from veneer.kernels.serving import serving
from veneer.remembered import machine_key, recall, remember_all

_FASTER = 0.8  # share of fp32's time: for less gain, its 24 bits of precision are worth more than bf16's 8
_FILE = "compute.json"
_SECONDS = 60.0  # after which a measurement is given up
_INSTRUCTIONS = {"amx_bf16", "avx512_bf16", "bf16"}  # as Linux calls them on x86 and on ARM


class Computing(NamedTuple):
    """The type that a model computes in, and why."""

    name: str  # fp32 or bf16
    reason: str  # in a few words; empty where it was asked for

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.name == "bf16" else torch.float32

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def computing(compute: str, storage: str, device: str = CPU) -> Computing:
    """What ``compute`` (auto, fp32 or bf16) is for weights kept in ``storage`` on a device that is here.

    Raises ConfigError for another name.
    """
    if compute not in COMPUTES:
        raise ConfigError(f"compute = {compute!r} is not one of {', '.join(COMPUTES)}.")
    if compute != "auto":
        return Computing(compute, "")
    if not is_host(device):
        known = computes_bf16(device)
        said = "has instructions for bf16" if known else "is not known to have instructions for bf16"
        return Computing("bf16" if known else "fp32", f"auto: {device} {said}")
    if not has_bf16():
        return Computing("fp32", "auto: this processor has no instructions for bf16")
    time = bf16_time(alike(storage))
    if time is None:
        return Computing("fp32", "auto: the time of a step in bf16 could not be measured")
    return Computing("bf16" if time < _FASTER else "fp32", f"auto: a step in bf16 takes {time:.2g} × the time of fp32")


def alike(storage: str) -> str:
    """One of the storages that compute alike: fp32, bf16 or nf4."""
    return "nf4" if storage in CODE_BITS else "fp32" if storage == "fp32" else "bf16"


@cache
def has_bf16() -> bool:
    """Whether this processor has instructions for bf16, as far as Linux says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    said = next((line for line in lines if line.partition(":")[0].strip() in ("flags", "Features")), "")
    return not _INSTRUCTIONS.isdisjoint(said.partition(":")[2].split())


def bf16_time(kind: str) -> float | None:
    """Time of a part of a step in bf16, as a multiple of fp32's, on this CPU with torch's threads; None where it could
    not be measured. ``kind``: of `alike`."""
    return _remembered(kind, torch.get_num_threads())


def remember_times(times: dict[tuple[str, int, str], float]) -> None:
    """Keep measurements for later: kind, torch's threads and the kernels' name → the ratio of `bf16_time`."""
    remember_all(_FILE, {_key(*made_with): ratio for made_with, ratio in times.items()})


def _key(kind: str, threads: int, kernels: str) -> str:
    return f"{machine_key(torch.__version__, threads)}, veneer {version('veneer')}, {kernels} kernels, {kind}"


@cache
def _remembered(kind: str, threads: int) -> float | None:
    """From the cache file, else measured and put there. A file that cannot be read or written is no error."""
    key = _key(kind, threads, serving())
    if isinstance(ratio := recall(_FILE, key), float) and ratio > 0:
        return ratio
    measured = _measured(kind, threads)
    if measured is not None:
        remember_times({(kind, threads, serving()): measured})
    return measured


def _measured(kind: str, threads: int) -> float | None:
    """By a process of its own, so that nothing of this one is in its way, nor changed by it."""
    command = [sys.executable, "-m", "veneer.runs.measure_compute", kind, str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
        return float(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
