"""A training step of AdaLoRA, before and after its cut, beside one of LoRA with the same initial rank.

    make bench

The packaged SmolLM2-135M, fp32, rank 12 (target 8) on all linear layers, 8 × 128 tokens of BBC articles. The three take
their steps in turn in one process, so that a slow minute of the machine slows all of them; the peak memory is that of
processes of their own. Who goes first, second and last is drawn at random each time. Run it on an idle machine.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import step
from common import in_a_process, peak_memory, save_model, versions
from tables import tell

RANK, TARGET = 12, 8
TIMED = 25
ROUNDS = 2  # of the memory
# What the C library keeps of freed memory differs by some per cent from process to process. Told to give large blocks
# back at once, it shows what is in use.
NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "60000", "MALLOC_TRIM_THRESHOLD_": "0"}
RESULT = Path(__file__).parent / "results" / "adalora.json"
# Ranks are taken from the second step on, for ever; or all of them in the second step.
SCHEDULES = {"before the cut": {"total_steps": 10_000, "tinit": 1}, "after the cut": {"total_steps": 3, "tfinal": 1}}
WARM = 2


def main() -> None:
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        result: dict[str, Any] = in_a_process(__file__, "time", folder)
        found: dict[str, list[float]] = {"lora": [], "before the cut": []}
        for _ in range(ROUNDS):
            for who, peaks in found.items():
                peaks.append(in_a_process(__file__, who, folder, settings=NOTHING_KEPT)["peak_gb"])
        result["peaks_gb"] = found
        result["peak_gb"] = {who: statistics.median(peaks) for who, peaks in found.items()}
    result["memory_ratio"] = result["peak_gb"]["before the cut"] / result["peak_gb"]["lora"]
    result["load_before"] = load_before
    result["versions"] = versions()
    RESULT.write_text(json.dumps(result, indent=2) + "\n")

    tell("adalora")
    print(f"Load before the run: {load_before:.2f}.")


class Training:
    """One model under training; a step at a time."""

    def __init__(self, who: str, folder: str, rank: int = RANK) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import veneer
        from veneer.data.labels import IGNORE, Tokens
        from veneer.kernels.heap import use_heap
        from veneer.training.loss import Loss

        use_heap()  # as the command does
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config: Any = veneer.LoRA(rank=rank)
        if who in SCHEDULES:
            config = veneer.AdaLoRA(initial_rank=rank, target_rank=TARGET, **SCHEDULES[who])
        veneer.attach(self.model, config)
        batches = step.batches(folder)
        self.rows = [[Tokens(ids, [IGNORE, *ids[1:]], "") for ids in batch] for batch in batches]
        self.loss = Loss(self.model, 0, self.rows[0][0], kind="causal")
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step(self, number: int) -> float:
        from veneer.training.fused import fused_passes

        started = time.perf_counter()
        with fused_passes(self.model), self.loss.attention():
            self.optimizer.zero_grad()
            loss = self.loss(self.rows[number % len(self.rows)]) / (step.ROWS * (step.LENGTH - 1))
            loss.backward()
            self.optimizer.step()
        return time.perf_counter() - started


def _time(folder: str) -> dict[str, dict[str, float]]:
    """The median seconds of a step of each, and the median over the rounds of its ratio to LoRA's step beside it."""
    trainings = {who: Training(who, folder) for who in ("lora", *SCHEDULES)}
    times: dict[str, list[float]] = {who: [] for who in trainings}
    for number in range(WARM + TIMED):
        for who in random.Random(number).sample(list(trainings), len(trainings)):
            times[who].append(trainings[who].step(number))
    timed = {who: found[WARM:] for who, found in times.items()}
    ratios = {who: [a / b for a, b in zip(timed[who], timed["lora"], strict=True)] for who in SCHEDULES}
    return {
        "seconds": {who: statistics.median(found) for who, found in timed.items()},
        "time_ratio": {who: statistics.median(found) for who, found in ratios.items()},
    }


def _memory(who: str, folder: str) -> dict[str, float]:
    training = Training(who, folder)
    for number in range(3):
        training.step(number)
    return {"peak_gb": peak_memory() / 1e9}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        job, model_folder = sys.argv[1:]
        print(json.dumps(_time(model_folder) if job == "time" else _memory(job, model_folder)))
