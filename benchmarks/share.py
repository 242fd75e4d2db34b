"""What share of a step's time its matrix products would take at torch.mm's own speed.

    make bench

The packaged SmolLM2-135M, fp32, rank 8 on all linear layers, 8 × 128 tokens, as in step.py. The products of a step are
those of the frozen layers forward and backward, of the adapters, and of the output head; each shape is timed by itself
as torch.mm does it, x (m, k) by a weight (n, k) transposed, the two in turn. Run it on an idle machine.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import adalora
import step
from common import in_a_process, save_model, versions

STEPS = 5
RESULT = Path(__file__).parent / "results" / "share.json"


def main() -> None:
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        result: dict[str, Any] = in_a_process(__file__, folder)
    result["load_before"], result["versions"] = load_before, versions()
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"A step's products are {result['gflop']:.0f} GFLOP: {result['achieved']:.0f} GFLOP/s over the whole step.")
    print(f"torch.mm alone takes them at {result['by_mm']:.0f} GFLOP/s; share {result['share']:.2f}.")


def _measure(folder: str) -> dict[str, float]:
    import torch

    training = adalora.Training("lora", folder, rank=step.RANK)
    products = products_of(training.model, step.ROWS * step.LENGTH)
    seconds, alone = [], []
    for number in range(STEPS + 1):
        seconds.append(training.step(number))
        alone.append(sum(count * time_of(torch, shape) for shape, count in products.items()))
    flop = sum(2 * m * k * n * count for (m, k, n), count in products.items())
    whole, by_mm = statistics.median(seconds[1:]), statistics.median(alone[1:])
    return {"gflop": flop / 1e9, "achieved": flop / whole / 1e9, "by_mm": flop / by_mm / 1e9, "share": by_mm / whole}


def products_of(model: Any, tokens: int) -> Counter[tuple[int, int, int]]:
    """(m, k, n) of each product of a step, and how many there are."""
    from veneer.updates.layers import AdaptedLinear

    found: Counter[tuple[int, int, int]] = Counter()
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            out, into = module.weight.shape
            rank = step.RANK
            found[tokens, into, out] += 1  # forward
            found[tokens, out, into] += 1  # its input's gradient
            found.update([(tokens, into, rank), (tokens, rank, out)])  # the update, forward
            found.update([(tokens, out, rank), (tokens, rank, into)])  # of the low product, and of the input
            found.update([(rank, tokens, into), (rank, tokens, out)])  # of A and B
    vocabulary, dim = model.get_output_embeddings().weight.shape
    found[tokens, dim, vocabulary] += 1
    found[tokens, vocabulary, dim] += 1
    return found


def time_of(torch: Any, shape: tuple[int, int, int], dtype: Any = None) -> float:
    """Seconds of x (m, k) by a weight (n, k) transposed."""
    m, k, n = shape
    a, b, out = (torch.randn(size).to(dtype or torch.float32) for size in ((m, k), (n, k), (m, n)))
    b = b.t()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(_measure(sys.argv[1])))
