"""Speed against the length of rows and the size of the model; a plot of each in docs/plots.

    make bench

Random weights, fp32, rank 8 on all linear layers, every token learned. Lengths: SmolLM2-135M's shape on 4096 tokens a
step in rows of 128 up to 4096. Sizes: four shapes of Llama's kind from 30M to 1B parameters on 8 × 128 tokens. Run it
on an idle machine.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import in_a_process, peak_memory, versions
from tables import tell

RANK, STEPS = 8, 3
TOKENS, LENGTHS = 4096, (128, 256, 512, 1024, 2048, 4096)
# hidden, inner, layers, heads, key heads, vocabulary
SHAPES = {
    "30M": (384, 1024, 8, 6, 2, 49152),
    "135M": (576, 1536, 30, 9, 3, 49152),
    "360M": (960, 2560, 32, 15, 5, 49152),
    "1B": (2048, 5632, 22, 32, 4, 32000),
}
RESULT = Path(__file__).parent / "results" / "lengths.json"
PLOTS = Path(__file__).parent.parent / "docs" / "plots"


def main() -> None:
    load_before = os.getloadavg()[0]
    result: dict[str, Any] = {"lengths": {}, "sizes": {}}
    for length in LENGTHS:
        result["lengths"][length] = _printed(in_a_process(__file__, "135M", str(TOKENS // length), str(length)))
    for name in SHAPES:
        result["sizes"][name] = _printed(in_a_process(__file__, name, "8", "128"))
    result["load_before"], result["versions"] = load_before, versions()
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    _draw(result)
    tell("lengths", "sizes")
    print(f"Plots in {PLOTS.relative_to(Path.cwd())}. Load before the run: {load_before:.2f}.")


def _printed(found: dict[str, Any]) -> dict[str, Any]:
    print(found, file=sys.stderr)
    return found


def _measure(name: str, rows: int, length: int) -> dict[str, Any]:
    from veneer.threads import settle

    settle()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import veneer
    from veneer.data.labels import IGNORE, Tokens
    from veneer.kernels.heap import use_heap
    from veneer.training.fused import fused_passes
    from veneer.training.loss import Loss

    use_heap()  # as the command does
    torch.manual_seed(0)
    hidden, inner, layers, heads, key_heads, vocabulary = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    veneer.attach(model, veneer.LoRA(rank=RANK))
    batch = torch.randint(vocabulary, (rows, length)).tolist()
    learned = [Tokens(ids, [IGNORE, *ids[1:]], "") for ids in batch]
    loss = Loss(model, 0, learned[0], kind="causal")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    times = []
    with fused_passes(model), loss.attention():
        for _ in range(STEPS):
            started = time.perf_counter()
            optimizer.zero_grad()
            (loss(learned) / (rows * (length - 1))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times[1:])
    # Of each weight (the embedding's is the head's) a product forward and one for the input's gradient; scores and
    # values, causal, forward and twice back. The adapters' are left out.
    flop = 4 * size * rows * length + 3 * 2 * layers * rows * length**2 * hidden
    return {
        "parameters": size, "tokens_per_second": rows * length / seconds, "gflop_per_second": flop / seconds / 1e9,
        "peak_gb": peak_memory() / 1e9,
    }  # fmt: skip


def _draw(result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    PLOTS.mkdir(exist_ok=True)
    lengths = result["lengths"]
    _plot(Figure, "length", list(map(int, lengths)), list(lengths.values()), "tokens of a row", 0)
    sizes = list(result["sizes"].values())
    _plot(Figure, "size", [found["parameters"] / 1e6 for found in sizes], sizes, "parameters, millions", None)


def _plot(new: Any, name: str, places: list[Any], found: list[dict[str, Any]], what: str, bottom: int | None) -> None:
    figure = new(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "tokens_per_second", "tokens/s"), (right, "gflop_per_second", "GFLOP/s")):
        axes.plot(places, [each[key] for each in found], "o-")
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:.0f}" for place in places])
        axes.set_xlabel(what)
        axes.set_ylabel(label)
        if bottom is not None or key == "gflop_per_second":
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.savefig(PLOTS / f"speed-{name}.png", dpi=120)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
