"""A program that measures how long a part of a training step takes in bf16, as a multiple of fp32's time.

``KIND THREADS``: how the weights are kept (fp32, bf16 or nf4), and torch's threads. Two layers of SmolLM2's size with
adapters, forward and backward by Veneer's own passes, in either type in turn: a busy machine slows both.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from veneer.threads import settle

_SIZES = {
    "vocab_size": 2048, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
_ROWS, _TOKENS = 4, 64  # of a step, and of a row
_STEPS = 12  # in either type, as far as there is time for them
_SECONDS = 1.0


def main() -> None:
    settle()
    import torch

    from veneer.kernels.heap import own_heap

    own_heap()
    kind, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    print(_shortest(_step(kind, torch.bfloat16), _step(kind, torch.float32)))


def _shortest(one: Callable[[], None], other: Callable[[], None]) -> float:
    """The shortest time of ``one`` over that of the ``other``."""
    times: tuple[list[float], list[float]] = ([], [])
    until = time.perf_counter() + _SECONDS
    for number in range(_STEPS + 1):  # the first one warms up
        for step, seconds in zip((one, other), times, strict=True):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        if number >= 2 and time.perf_counter() > until:
            break
    return min(times[0][1:]) / min(times[1][1:])


def _step(kind: str, dtype: Any) -> Callable[[], None]:
    """A step of the small model, its weights kept as ``kind`` says, computed in ``dtype``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from veneer.data.labels import Tokens
    from veneer.frozen.config import CODE_BITS
    from veneer.frozen.layers import DTYPES, compute_in, compute_of, quantise_linear_layers
    from veneer.training.fused import fused_passes
    from veneer.training.loss import Loss
    from veneer.updates.attach import attach
    from veneer.updates.config import LoRA

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES))
    if kind in CODE_BITS:
        quantise_linear_layers(model, storage=kind, block_size=64, double_quantisation=True)
    else:
        model.to(DTYPES[kind])
    if compute_of(model) is not dtype:
        compute_in(model, dtype)
    attach(model, LoRA())
    model.train()
    ids = list(range(1, _TOKENS + 1))
    rows = [Tokens(ids, ids, "")] * _ROWS
    loss = Loss(model, 0, rows[0], kind="causal")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with ExitStack() as stack:
            for context in (fused_passes(model), loss.attention()):
                stack.enter_context(context)
            loss(rows).backward()  # type: ignore[no-untyped-call]

    return step


if __name__ == "__main__":
    main()
