"""The 4-bit kernels against bitsandbytes and plain PyTorch on one 4096 × 4096 weight, in turn in one process.

    make bench

NF4 in blocks of 64, nested scales on both sides. Run it on an idle machine.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import versions

from veneer.frozen.blockwise import expand, prepared_int8, quantise
from veneer.frozen.weight import BlockwiseWeight
from veneer.kernels.operators import serving

SIZE, BLOCK, TOKENS = 4096, 64, 256
ROUNDS = 7
RESULT = Path(__file__).parent / "results" / "kernels.json"


def main() -> None:
    load_before = os.getloadavg()[0]
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE) * 0.02
    rows = _rows(weight)
    result: dict[str, Any] = {"milliseconds": {name: _measure(work) for name, work in rows.items()}}
    times = result["milliseconds"]
    result["ratios"] = {
        f"{name}: {other} / veneer": found[other] / found["veneer"]
        for name, found in times.items()
        for other in found
        if other != "veneer"
    }
    # Bits a weight that must move: 4.127 in and 32 out; a copy has 32 both ways.
    copied = times["dequantise into a buffer"]["copy"] / (2 * 32)
    result["dequantise_share_of_copy_bandwidth"] = copied / (times["dequantise into a buffer"]["veneer"] / (4.127 + 32))
    result["kernels"], result["load_before"], result["versions"] = serving(), load_before, versions("bitsandbytes")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")

    print(f"\nA {SIZE} × {SIZE} weight, {serving()}, {torch.get_num_threads()} threads; median of {ROUNDS}, in turn\n")
    print("| operation | Veneer | bitsandbytes | PyTorch fp32 | bitsandbytes / Veneer | fp32 / Veneer |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, found in times.items():
        theirs, plain = found.get("bitsandbytes"), found.get("fp32", found.get("copy"))
        cells = [f"{found['veneer']:.2f} ms", *(f"{value:.2f} ms" if value else "" for value in (theirs, plain))]
        cells += [f"{value / found['veneer']:.2f} ×" if value else "" for value in (theirs, plain)]
        print(f"| {name} | {' | '.join(cells)} |")
    share = result["dequantise_share_of_copy_bandwidth"]
    print(f"\nFor dequantise, fp32 is a copy; into a buffer Veneer reaches {share:.0%} of its bandwidth. On a CPU")
    print("bitsandbytes only gives a new tensor, most of whose time is the system's for its pages.")
    print(f"Written to {RESULT.relative_to(Path.cwd())}. Load before the run: {load_before:.2f}.")


def _rows(weight: torch.Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    logging.disable(logging.WARNING)  # bitsandbytes warns at its import of GPU kernels that are not here
    import bitsandbytes
    from bitsandbytes import functional

    logging.disable(logging.NOTSET)
    ours = quantise(weight)
    frozen = BlockwiseWeight(ours)
    in_8_bits = prepared_int8(ours)
    options: dict[str, Any] = {"blocksize": BLOCK, "quant_type": "nf4", "compress_statistics": True}
    codes, state = functional.quantize_4bit(weight, **options)
    out = torch.empty_like(weight)
    one, few, many = (torch.randn(n, SIZE) for n in (1, 8, TOKENS))
    followed = many.clone().requires_grad_()
    grad = torch.randn(TOKENS, SIZE)

    def plain_step() -> None:
        torch.nn.functional.linear(followed, weight).backward(grad)

    def our_step() -> None:
        frozen.product(many)
        frozen.product_transposed(grad)

    def their_step() -> None:
        bitsandbytes.matmul_4bit(followed, codes.t(), quant_state=state).backward(grad)

    def theirs(x: torch.Tensor) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)

        return run

    return {
        "quantise": {
            "veneer": lambda: quantise(weight),
            "bitsandbytes": lambda: functional.quantize_4bit(weight, **options),
        },
        "dequantise": {
            "veneer": frozen.dense,
            "bitsandbytes": lambda: functional.dequantize_4bit(codes, state),
            "copy": weight.clone,
        },
        "dequantise into a buffer": {
            "veneer": lambda: expand(ours, 0, SIZE, weight.dtype),
            "bitsandbytes": lambda: functional.dequantize_4bit(codes, state),
            "copy": lambda: out.copy_(weight),
        },
        "product of 1 token": {
            "veneer": lambda: frozen.product(one),
            "bitsandbytes": theirs(one),
            "fp32": lambda: one @ weight.t(),
        },
        "product of 1 token, activations in 8 bits": {
            "veneer": lambda: in_8_bits(one),
            "bitsandbytes": theirs(one),
            "fp32": lambda: one @ weight.t(),
        },
        "product of 8 tokens": {
            "veneer": lambda: frozen.product(few),
            "bitsandbytes": theirs(few),
            "fp32": lambda: few @ weight.t(),
        },
        "product of 8 tokens, activations in 8 bits": {
            "veneer": lambda: in_8_bits(few),
            "bitsandbytes": theirs(few),
            "fp32": lambda: few @ weight.t(),
        },
        f"{TOKENS} tokens, forward and backward": {
            "veneer": our_step,
            "bitsandbytes": their_step,
            "fp32": plain_step,
        },
    }


def _measure(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each, measured in turn."""
    times: dict[str, list[float]] = {who: [] for who in work}
    for number in range(ROUNDS + 1):
        for who, run in work.items():
            started = time.perf_counter()
            run()
            if number:  # the first warms up
                times[who].append((time.perf_counter() - started) * 1e3)
    return {who: statistics.median(found) for who, found in times.items()}


if __name__ == "__main__":
    main()
