"""What each storage costs in bits and in quality, without any training: the paper's Table 2 on this machine.

    make bench

Relative squared error on the genuine fp32 weights of the packaged MiniLM, and held-out perplexity of SmolLM2-135M on
news articles (arXiv:2305.14314, table 2). SmolLM2's packaged weights were kept in 4 bits before, on a grid of their own
in blocks of 32. So the perplexities are taken twice: as it is packaged, and with each weight moved at random within its
cell of that grid, which gives the weights a network's smooth distribution back.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from common import articles
from tables import tell

import veneer
from veneer.data.labels import IGNORE, Tokens
from veneer.frozen.layers import linear_layers
from veneer.studies.storage import bits_and_error, kept_in
from veneer.training.loss import Loss

ARTICLES, LENGTH = 12, 256
GRID_BLOCK, GRID_STEPS = 32, 15  # of the format of SmolLM2's file, Q4_1
RESULT = Path(__file__).parent / "results" / "storage.json"
STORAGES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"storage": "bf16"},
    "int8": {"storage": "int8", "double_quantisation": True},
    "nf4, block 32, DQ": {"storage": "nf4", "block_size": 32, "double_quantisation": True},
    "nf4": {"storage": "nf4", "double_quantisation": False},
    "nf4, DQ": {"storage": "nf4", "double_quantisation": True},
    "fp4": {"storage": "fp4", "double_quantisation": False},
    "int4": {"storage": "int4", "double_quantisation": False},
}


def main() -> None:
    smollm2, tokenizer = veneer.load("smollm2-135m-instruct")
    minilm, _ = veneer.load("minilm-l6", labels=["one", "other"])
    rows = _articles(tokenizer)
    dithered = _dithered(copy.deepcopy(smollm2))
    result: dict[str, dict[str, float]] = {}
    for name, how in STORAGES.items():
        bits, error = bits_and_error(minilm, how)
        found = {"bits": bits, "relative_squared_error": error}
        for which, model in (("packaged", smollm2), ("off_grid", dithered)):
            kept = kept_in(model, how)
            found[f"perplexity_{which}"] = math.exp(Loss(kept, 0, rows[0], kind="causal").mean(rows, 4))
        result[name] = found
        print(name, found, file=sys.stderr)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    tell("storage")


def _dithered(model: Any) -> Any:
    """Each weight of the linear layers moved, uniformly, by up to half a step of its grid."""
    torch.manual_seed(0)
    for name in linear_layers(model):
        weight = model.get_submodule(name).weight
        blocks = weight.data.view(-1, GRID_BLOCK)
        step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / GRID_STEPS
        blocks.add_((torch.rand_like(blocks) - 0.5) * step)
    return model


def _articles(tokenizer: Any) -> list[Tokens]:
    """The beginnings of news articles, every token learned."""
    texts = articles()
    texts = texts[:: len(texts) // ARTICLES]
    ids = [tokenizer(text).input_ids[:LENGTH] for text in texts[:ARTICLES]]
    return [Tokens(row, [IGNORE, *row[1:]], "") for row in ids]


if __name__ == "__main__":
    main()
