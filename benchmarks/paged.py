"""A step of PagedAdamW against torch.optim.AdamW: with states that fit its budget, with states that do not, and with
states that exceed a memory control group's limit as well.

    python benchmarks/paged.py

One matrix of parameters in fp32 with its gradient, no model around it, so this is the optimizer's time alone: of a
training step it is a small part. Run it on an idle machine. Without the right to make a control group (root, version
1), the last row is left out.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import tell

STATES = 400 * 10**6  # bytes
# Name → optimizer, budget of states in memory, limit of the group in bytes
CASES: dict[str, tuple[str, str, int]] = {
    "torch": ("torch", "", 0),
    "fits": ("paged", "1GB", 0),
    "half fits": ("paged", "200MB", 0),
    "a tenth fits": ("paged", "40MB", 0),
    "a tenth fits, memory for half": ("paged", "40MB", STATES // 2),
}
WARM, TIMED, ROUNDS = 2, 6, 3
RESULT = Path(__file__).parent / "results" / "paged.json"


def main() -> None:
    load_before = os.getloadavg()[0]
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, case in CASES.items():
            command = [sys.executable, __file__, *map(str, case)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name}: left out: {done.stderr.splitlines()[-1:]}", file=sys.stderr)
            else:
                times[name].append(float(done.stdout))
    found = {name: statistics.median(each) for name, each in times.items() if each}
    result: dict[str, Any] = {
        "seconds": found,
        "ratios": {name: seconds / found["torch"] for name, seconds in found.items()},
        "states_bytes": STATES,
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "load_before": load_before,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{STATES / 1e6:.0f} MB of states; {result['machine']}; median of {ROUNDS} runs")
    tell("paged")


def _measure(which: str, resident: str, limit: int) -> float:
    """Median seconds of a step."""
    import time

    import torch

    from veneer.training.paged_adamw import PagedAdamW

    parameter = torch.nn.Parameter(torch.randn(STATES // 8 // 1000, 1000))
    parameter.grad = torch.randn_like(parameter)
    with tempfile.TemporaryDirectory(dir=".") as folder, _group(limit):
        if which == "paged":
            optimizer: torch.optim.Optimizer = PagedAdamW([parameter], folder=folder, resident=resident)
        else:
            optimizer = torch.optim.AdamW([parameter], fused=True)
        times = []
        for _ in range(WARM + TIMED):
            started = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - started)
    return statistics.median(times[WARM:])


class _group:  # noqa: N801
    """This process in a memory control group of ``limit`` bytes; 0: where it is."""

    def __init__(self, limit: int) -> None:
        self._limit, self._folder = limit, Path(f"/sys/fs/cgroup/memory/veneer-bench-{os.getpid()}")

    def __enter__(self) -> None:
        if self._limit:
            self._folder.mkdir()
            (self._folder / "memory.limit_in_bytes").write_text(str(self._limit))
            (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def __exit__(self, *_: object) -> None:
        if self._limit:
            (self._folder.parent / "cgroup.procs").write_text(str(os.getpid()))
            self._folder.rmdir()


def _processor() -> str:
    """The processor's name, where the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3])))
