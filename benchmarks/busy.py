"""A step's speed beside other work on the same cores: a busy process of one thread, and a second training run.

    make bench

The packaged SmolLM2-135M, fp32, rank 8 on all linear layers, 8 × 128 tokens, with the threads as `veneer` settles them;
peft as it comes, beside the busy process alone. Tokens/s against those of the idle machine, which this must be before.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import step
from common import in_a_process, save_model, versions
from tables import tell

ROUNDS = 2
BUSY = [sys.executable, "-c", "while True: pass"]
RESULT = Path(__file__).parent / "results" / "busy.json"


def main() -> None:
    load_before = os.getloadavg()[0]
    speeds: dict[str, dict[str, list[float]]] = {who: {} for who in step.SIDES}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        second = [sys.executable, __file__, "forever", folder]
        for _ in range(ROUNDS):
            for who in step.SIDES:
                for beside, command in (("nothing", None), ("a busy process", BUSY), ("a second run", second)):
                    if who == "peft" and command is second:
                        continue  # minutes a step
                    with nullcontext() if command is None else _beside(command):
                        found = in_a_process(__file__, who, folder)["tokens_per_second"]
                    speeds[who].setdefault(beside, []).append(found)
                    print(f"{who} beside {beside}: {found:.0f} tokens/s", file=sys.stderr)
    medians = {who: {beside: statistics.median(of) for beside, of in found.items()} for who, found in speeds.items()}
    result: dict[str, Any] = {"tokens_per_second": medians, "load_before": load_before, "versions": versions("peft")}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    tell("busy")
    print(f"Load before the run: {load_before:.2f}.")


@contextmanager
def _beside(command: list[str]) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if command is not BUSY:  # wait until it trains
            assert process.stdout is not None
            process.stdout.readline()
        try:
            yield
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended while it should have kept the cores busy")
        finally:
            process.kill()


def _measure(who: str, folder: str) -> dict[str, Any]:
    if who == "veneer":
        from veneer.threads import settle

        settle()
    return step._measure_steps(who, "fp32", folder)


def _forever(folder: str) -> None:
    from veneer.threads import settle

    settle()
    import adalora

    training, number = adalora.Training("lora", folder, rank=step.RANK), 0
    while True:
        training.step(number)
        number += 1
        if number == 1:
            print("training", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "forever":
        _forever(sys.argv[2])
    else:
        print(json.dumps(_measure(*sys.argv[1:])))
