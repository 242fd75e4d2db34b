"""The products of a training step by oneDNN (`veneer.kernels.dense`) and by torch's own F.linear, in turn.

    make bench

1,024 rows, the layers of the packaged SmolLM2-135M with rank 8, and its head at the rows of one chunk of the loss. And
the low-rank update of one layer's seven matrices, forward and backward, by its own C++ kernels and by products
(their definitions).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.backends import cpu
from veneer.kernels.dense import linear
from veneer.kernels.extension import VARIANTS
from veneer.kernels.operations.update import update_product, update_product_backward

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
# in, out of a layer's matrices, and how many there are
MATRICES = {(576, 576): 2, (576, 192): 2, (576, 1536): 2, (1536, 576): 1}
TOKENS, RANKS = (32, 256, 1024), (4, 8, 12, 16, 24)


def main() -> None:
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    print("| product | rows × in × out | F.linear, GFLOP/s | oneDNN, GFLOP/s | ratio |\n|---|---|---:|---:|---:|")
    for name, (rows, inner, out) in SHAPES.items():
        x, weight = torch.randn(rows, inner), torch.randn(out, inner)
        seconds = _in_turn({"torch": partial(F.linear, x, weight), "onednn": partial(linear, x, weight)})
        rate = {who: 2 * rows * inner * out / found / 1e9 for who, found in seconds.items()}
        result[name] = {**rate, "ratio": rate["onednn"] / rate["torch"]}
        shape = f"{rows} × {inner} × {out}"
        print(f"| {name} | {shape} | {rate['torch']:.0f} | {rate['onednn']:.0f} | {result[name]['ratio']:.2f} × |")
    print("\n| update | products, ms | kernels, ms | ratio |\n|---|---:|---:|---:|")
    for tokens in TOKENS:
        for rank in RANKS:
            seconds = _update(tokens, rank)
            ratio = seconds["products"] / seconds["kernels"]
            result[f"update of {tokens} tokens, rank {rank}"] = {**seconds, "ratio": ratio}
            shown = " | ".join(f"{1e3 * seconds[who]:.2f}" for who in ("products", "kernels"))
            print(f"| {tokens} tokens, rank {rank} | {shown} | {ratio:.2f} × |")
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def _update(tokens: int, rank: int) -> dict[str, float]:
    """Seconds of a layer's updates, forward and backward."""
    kernels = cpu.Cpu(VARIANTS[-1])
    in_cpp = kernels.update_product, kernels.update_product_backward
    by_products = update_product.definition, update_product_backward.definition
    seconds = dict.fromkeys(("products", "kernels"), 0.0)
    for (inner, out), count in MATRICES.items():
        of_x, of_y = (tokens, inner), (tokens, out)
        given = [torch.randn(shape) for shape in (of_x, of_y, (rank, inner), (out, rank), of_y, of_x)]
        for who, found in _in_turn(
            {"products": partial(_both, by_products, *given), "kernels": partial(_both, in_cpp, *given)}
        ).items():
            seconds[who] += count * found
    return seconds


def _both(by: Any, x: Tensor, grad: Tensor, A: Tensor, B: Tensor, y: Tensor, grad_x: Tensor) -> None:
    """The update added to an output, and its gradients, that of x added to another."""
    forward, backward = by
    low = forward(x, A, B, 2.0, y)
    backward(grad, x, low, A, B, 2.0, grad_x)


def _in_turn(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {who: [] for who in ways}
    for _ in range(ROUNDS):
        for who, way in ways.items():
            started = time.perf_counter()
            way()
            times[who].append(time.perf_counter() - started)
    return {who: statistics.median(found) for who, found in times.items()}


if __name__ == "__main__":
    main()
