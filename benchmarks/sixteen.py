"""A layer kept in 16 bits and multiplied in fp32, panel by panel, against the layer kept in fp32.

    python benchmarks/sixteen.py

Forward and the gradient of the input, 1024 tokens. What bf16's own products take on this machine is beside it: it
is a part of what decides whether `compute: auto` is bf16.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import tell

from veneer.frozen.compute import bf16_time, computing
from veneer.frozen.weight import DenseWeight

TOKENS, ROUNDS = 1024, 9
SHAPES = ((1536, 576), (576, 1536), (4096, 4096))  # (out, in)
RESULT = Path(__file__).parent / "results" / "sixteen.json"


def main() -> None:
    found: dict[str, Any] = {
        "bf16_over_fp32": bf16_time("bf16"), "computes_in": computing("auto", "bf16").name, "shapes": {},
    }  # fmt: skip
    for out, columns in SHAPES:
        x, weight = torch.randn(TOKENS, columns), torch.randn(out, columns)
        cases = {
            "fp32": _passes(x, weight),
            "bf16": _passes(x, weight.bfloat16()),
            "fp16": _passes(x, weight.half()),
            "bf16 alone": _passes(x.bfloat16(), weight.bfloat16()),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(ROUNDS):  # in turn, so that what else happens on the machine happens to all
            for name, case in cases.items():
                started = time.perf_counter()
                case()
                times[name].append(time.perf_counter() - started)
        seconds = {name: statistics.median(each[1:]) for name, each in times.items()}
        ratios = {name: seconds[name] / seconds["fp32"] for name in cases if name != "fp32"}
        found["shapes"][f"{out} × {columns}"] = {"seconds": seconds, "over_fp32": ratios}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    tell("sixteen")


def _passes(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    frozen = DenseWeight(weight)
    return lambda: frozen.product_transposed(frozen.product(x))


if __name__ == "__main__":
    main()
