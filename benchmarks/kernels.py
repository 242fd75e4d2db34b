"""The 4-bit kernels against bitsandbytes and PyTorch on a 4096 × 4096 weight, each in a process of its own, in turn.

    make bench

NF4 in blocks of 64, nested scales on both sides. A call follows another: by the same weight, whose codes then are in
the caches, or around a ring of equal weights that they cannot hold, as in a model that generates. Run it on an idle
machine.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import in_a_process, versions
from tables import tell

SIZE, BLOCK, TOKENS = 4096, 64, 256
RING = 8  # weights of 8.7 MB
REPEATS, ROUNDS = 9, 3
ONE, EIGHT, IN_8_BITS, AROUND = (
    "product of 1 token",
    "product of 8 tokens",
    ", activations in 8 bits",
    ", around the ring",
)
SIDES = ("veneer", "bitsandbytes", "fp32")
RESULT = Path(__file__).parent / "results" / "kernels.json"


def main() -> None:
    load_before = os.getloadavg()[0]
    rounds: dict[str, dict[str, list[float]]] = {}
    for number in range(ROUNDS):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            for name, milliseconds in in_a_process(__file__, side).items():
                rounds.setdefault(name, {}).setdefault(side, []).append(milliseconds)
    result: dict[str, Any] = {
        "milliseconds": {
            name: {side: statistics.median(found) for side, found in of_sides.items()}
            for name, of_sides in rounds.items()
        }
    }
    times = result["milliseconds"]
    result["ratios"] = {
        f"{name}: {other} / veneer": found[other] / found["veneer"]
        for name, found in times.items()
        for other in found
        if other != "veneer"
    }
    # Bits a weight that must move: 4.127 in and 32 out; a copy has 32 both ways.
    copied = times["dequantise into a buffer"]["fp32"] / (2 * 32)
    result["dequantise_share_of_copy_bandwidth"] = copied / (times["dequantise into a buffer"]["veneer"] / (4.127 + 32))
    from veneer.kernels.serving import serving

    result["kernels"], result["load_before"], result["versions"] = serving(), load_before, versions("bitsandbytes")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")

    tell("kernels")
    share = result["dequantise_share_of_copy_bandwidth"]
    print(f"\nFor dequantise, fp32 is a copy; into a buffer Veneer reaches {share:.0%} of its bandwidth. On a CPU")
    print("bitsandbytes only gives a new tensor, most of whose time is the system's for its pages.")
    print(f"{serving()}, {torch.get_num_threads()} threads. Load before the run: {load_before:.2f}.")


def _work_of(side: str) -> dict[str, list[Callable[[], object]]]:
    """Operation → the calls that are timed together."""
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE) * 0.02
    one, few, many = (torch.randn(n, SIZE) for n in (1, 8, TOKENS))
    grad = torch.randn(TOKENS, SIZE)
    make = {"veneer": _veneer, "bitsandbytes": _bitsandbytes, "fp32": _fp32}[side]
    return make(weight, one, few, many, grad)


def _veneer(
    weight: torch.Tensor, one: torch.Tensor, few: torch.Tensor, many: torch.Tensor, grad: torch.Tensor
) -> dict[str, list[Callable[[], object]]]:
    from veneer.frozen.blockwise import expand, prepared_int8, quantise
    from veneer.frozen.weight import BlockwiseWeight

    ring = [quantise(weight) for _ in range(RING)]
    weights = [BlockwiseWeight(made) for made in ring]
    in_8_bits = [prepared_int8(made) for made in ring]
    return {
        "quantise": [lambda: quantise(weight)],
        "dequantise": [weights[0].dense],
        "dequantise into a buffer": [lambda made=made: expand(made, 0, SIZE, weight.dtype) for made in ring],
        ONE: [lambda: weights[0].product(one)],
        ONE + AROUND: [lambda w=w: w.product(one) for w in weights],
        ONE + IN_8_BITS: [lambda: in_8_bits[0](one)],
        ONE + IN_8_BITS + AROUND: [lambda product=product: product(one) for product in in_8_bits],
        EIGHT: [lambda: weights[0].product(few)],
        EIGHT + IN_8_BITS: [lambda: in_8_bits[0](few)],
        f"{TOKENS} tokens, forward and backward": [
            lambda w=w: (w.product(many), w.product_transposed(grad)) for w in weights[:2]
        ],
    }  # fmt: skip


def _bitsandbytes(
    weight: torch.Tensor, one: torch.Tensor, few: torch.Tensor, many: torch.Tensor, grad: torch.Tensor
) -> dict[str, list[Callable[[], object]]]:
    logging.disable(logging.WARNING)  # it warns at its import of GPU kernels that are not here
    import bitsandbytes
    from bitsandbytes import functional

    options: dict[str, Any] = {"blocksize": BLOCK, "quant_type": "nf4", "compress_statistics": True}
    ring = [functional.quantize_4bit(weight, **options) for _ in range(RING)]
    followed = many.clone().requires_grad_()

    def product(x: torch.Tensor) -> list[Callable[[], object]]:
        def run(codes: torch.Tensor, state: Any) -> object:
            with torch.no_grad():
                return bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)

        return [lambda codes=codes, state=state: run(codes, state) for codes, state in ring]

    def step(codes: torch.Tensor, state: Any) -> None:
        bitsandbytes.matmul_4bit(followed, codes.t(), quant_state=state).backward(grad)

    dequantise = [lambda codes=codes, state=state: functional.dequantize_4bit(codes, state) for codes, state in ring]
    return {
        "quantise": [lambda: functional.quantize_4bit(weight, **options)],
        "dequantise": dequantise[:1],
        "dequantise into a buffer": dequantise,
        **dict.fromkeys((ONE, ONE + IN_8_BITS), product(one)[:1]),
        **dict.fromkeys((ONE + AROUND, ONE + IN_8_BITS + AROUND), product(one)),
        **dict.fromkeys((EIGHT, EIGHT + IN_8_BITS), product(few)[:1]),
        f"{TOKENS} tokens, forward and backward": [
            lambda codes=codes, state=state: step(codes, state) for codes, state in ring[:2]
        ],
    }


def _fp32(
    weight: torch.Tensor, one: torch.Tensor, few: torch.Tensor, many: torch.Tensor, grad: torch.Tensor
) -> dict[str, list[Callable[[], object]]]:
    out = torch.empty_like(weight)
    ring = [weight, weight.clone()]  # of 67 MB
    followed = many.clone().requires_grad_()

    def product(x: torch.Tensor) -> list[Callable[[], object]]:
        return [lambda w=w: x @ w.t() for w in ring]

    return {
        "dequantise": [weight.clone],
        "dequantise into a buffer": [lambda w=w: out.copy_(w) for w in ring],
        **dict.fromkeys((ONE, ONE + IN_8_BITS), product(one)[:1]),
        **dict.fromkeys((ONE + AROUND, ONE + IN_8_BITS + AROUND), product(one)),
        **dict.fromkeys((EIGHT, EIGHT + IN_8_BITS), product(few)[:1]),
        f"{TOKENS} tokens, forward and backward": [
            lambda w=w: torch.nn.functional.linear(followed, w).backward(grad) for w in ring
        ],
    }


def _milliseconds(calls: list[Callable[[], object]]) -> float:
    """Of one call, the median over REPEATS of all of them one after another."""
    times = []
    for number in range(REPEATS + 1):
        started = time.perf_counter()
        for call in calls:
            call()
        if number:  # the first warms up
            times.append((time.perf_counter() - started) / len(calls) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps({name: _milliseconds(calls) for name, calls in _work_of(sys.argv[1]).items()}))
