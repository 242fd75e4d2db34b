"""From the command to the first step: `veneer train` on the packaged model, its file read once before.

    make bench

Beside it, what no trainer can save: importing torch and transformers, and reading the weights. Run it on an idle
machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import save_model, versions

ROUNDS = 5
MODEL = "smollm2-135m-instruct"
LEAST = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(sum(float(parameter.detach().sum()) for parameter in model.parameters()))
"""
RESULT = Path(__file__).parent / "results" / "start.json"


def main() -> None:
    load_before = os.getloadavg()[0]
    times: dict[str, list[float]] = {"to the first step": [], "the step itself": [], "least": []}
    with tempfile.TemporaryDirectory() as scratch:
        _first_step(Path(scratch) / "warm")  # the model's file is converted, once
        folder = f"{scratch}/model"
        save_model(folder)
        for number in range(ROUNDS):
            whole, of_step = _first_step(Path(scratch) / str(number))
            times["to the first step"].append(whole - of_step)
            times["the step itself"].append(of_step)
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", LEAST, folder], check=True, capture_output=True)
            times["least"].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratio = medians["to the first step"] / medians["least"]
    result: dict[str, Any] = {"seconds": medians, "over_least": ratio, "load_before": load_before}
    RESULT.write_text(json.dumps(result | {"versions": versions()}, indent=2) + "\n")
    print(f"From the command until the first step begins: {medians['to the first step']:.1f} s, {ratio:.2f} × of what")
    print(f"importing transformers and reading the weights takes ({medians['least']:.1f} s); the step itself")
    print(f"{medians['the step itself']:.1f} s. Median of {ROUNDS}. Load before the run: {load_before:.2f}.")


def _first_step(output: Path) -> tuple[float, float]:
    """Seconds from the command until the first step has been taken, and those of the step."""
    command = [Path(sys.executable).with_name("veneer"), "train", "--model", MODEL, "--data", "bbc-topics", "--output",
               output, "--steps", "100", "--batch-size", "16", "--held-out", "0"]  # fmt: skip
    metrics = output / "metrics.jsonl"
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (metrics.is_file() and "\n" in metrics.read_text(encoding="utf-8")):
            if process.poll() is not None:
                raise SystemExit("the run ended before its first step")
            time.sleep(0.01)
        whole = time.perf_counter() - started
        process.kill()
    first = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
    return whole, first["tokens"] / first["tokens_per_second"]


if __name__ == "__main__":
    main()
