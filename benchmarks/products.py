"""The products of a training step by oneDNN (`veneer.kernels.dense`) and by torch's own F.linear, in turn.

    make bench

1,024 rows, the layers of the packaged SmolLM2-135M with rank 8, and its head at the rows of one chunk of the loss.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.dense import linear

RESULT = Path(__file__).parent / "results" / "products.json"
ROUNDS = 15
# name → (rows, in, out)
SHAPES = {
    "attention": (1024, 576, 576),
    "gate, up": (1024, 576, 1536),
    "down": (1024, 1536, 576),
    "head": (170, 576, 49152),
    "x Aᵀ": (1024, 576, 8),
    "gradient of A": (8, 1024, 576),
    "gradient of B": (8, 1024, 1536),
}


def main() -> None:
    torch.manual_seed(0)
    result = {}
    print("| product | rows × in × out | F.linear, GFLOP/s | oneDNN, GFLOP/s | ratio |\n|---|---|---:|---:|---:|")
    for name, (rows, inner, out) in SHAPES.items():
        x, weight = torch.randn(rows, inner), torch.randn(out, inner)
        seconds = _in_turn({"torch": F.linear, "onednn": linear}, x, weight)
        rate = {who: 2 * rows * inner * out / found / 1e9 for who, found in seconds.items()}
        result[name] = {**rate, "ratio": rate["onednn"] / rate["torch"]}
        shape = f"{rows} × {inner} × {out}"
        print(f"| {name} | {shape} | {rate['torch']:.0f} | {rate['onednn']:.0f} | {result[name]['ratio']:.2f} × |")
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def _in_turn(ways: dict[str, Callable[..., Tensor]], x: Tensor, weight: Tensor) -> dict[str, float]:
    times: dict[str, list[float]] = {who: [] for who in ways}
    for _ in range(ROUNDS):
        for who, product in ways.items():
            started = time.perf_counter()
            product(x, weight)
            times[who].append(time.perf_counter() - started)
    return {who: statistics.median(found) for who, found in times.items()}


if __name__ == "__main__":
    main()
