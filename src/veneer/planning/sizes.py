"""The models that the question is asked of most: what methods take at Llama's sizes, by the same formulas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from veneer.device import CUDA
from veneer.frozen.config import Storage
from veneer.options import memory_size
from veneer.planning.config import PlanOptions
from veneer.planning.empty import Base
from veneer.planning.plan import NO_MACHINE, Plan, plan
from veneer.planning.repeat import SHOWN
from veneer.training.config import TrainConfig

# name → hidden, layers, heads, heads of keys and values, intermediate (arXiv:2302.13971, table 2; arXiv:2307.09288)
SIZES = {
    "7B": (4096, 32, 32, 32, 11008),
    "13B": (5120, 40, 40, 40, 13824),
    "33B": (6656, 60, 52, 52, 17920),
    "65B": (8192, 80, 64, 64, 22016),
    "70B": (8192, 80, 64, 8, 28672),
}
_VOCABULARY = 32000
_LENGTH = 512
_RESIDENT = str(TrainConfig.model_fields["optimizer_memory"].default)


@dataclass(frozen=True)
class Way:
    """A way of fine-tuning, as options."""

    method: str
    storage: Storage
    dense: torch.dtype  # of what a storage of codes leaves as it is
    optimizer: str = "adamw"


# As the paper counts them, on a GPU: all that is not in codes is in 16 bits, AdamW's moments in 32.
WAYS = {
    "full, 16 bits": Way("full", "bf16", torch.bfloat16),
    "LoRA, 16 bits": Way("lora", "bf16", torch.bfloat16),
    "QLoRA": Way("lora", "nf4", torch.bfloat16),
    "QLoRA, paged": Way("lora", "nf4", torch.bfloat16, "paged-adamw"),
}


@dataclass(frozen=True)
class Sizes:
    """Size → way → its plan."""

    plans: dict[str, dict[str, Plan]]
    rank: int

    def as_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "tokens": _LENGTH,
            "models": {size: {way: made.as_json() for way, made in row.items()} for size, row in self.plans.items()},
        }

    def show(self, console: Console) -> None:
        console.print(self.table())

    def table(self) -> Table:
        table = Table(
            title=f"Memory in GB: rank {self.rank} on all linear layers, a row of {_LENGTH} tokens, checkpointing",
            title_justify="left",
        )
        for name in ("", *WAYS):
            table.add_column(name, justify="right" if name else "left")
        for size, row in self.plans.items():
            table.add_row(size, *(f"{made.peak / 1e9:,.1f}" for made in row.values()))
        return table


def sizes(rank: int = 8) -> Sizes:
    """The memory of each way at each size: a row at a time, every layer's activations computed again."""
    return Sizes({size: {name: _plan(size, way, rank) for name, way in WAYS.items()} for size in SIZES}, rank)


def _plan(size: str, way: Way, rank: int) -> Plan:
    """All layers are equal, so two small numbers of them tell what each one more adds, to the byte."""
    few, more = (_plan_of(size, way, rank, layers) for layers in (SHOWN, SHOWN + 1))
    left = SIZES[size][1] - SHOWN
    terms = {name: value + left * (more.terms[name] - value) for name, value in few.terms.items()}
    if way.optimizer == "paged-adamw":
        terms["optimizer states"] = min(8 * _at(few.parameters, more.parameters, left), memory_size(_RESIDENT))
    return replace(
        few, terms=terms, loading=_at(few.loading, more.loading, left), layers=SIZES[size][1],
        recomputed=SIZES[size][1], parameters=_at(few.parameters, more.parameters, left),
    )  # fmt: skip


def _at(few: int, more: int, left: int) -> int:
    return few + left * (more - few)


def config_of(size: str, layers: int | None = None) -> LlamaConfig:
    """The model of that size; or one of so many ``layers`` that is else the same."""
    hidden, all_layers, heads, key_heads, intermediate = SIZES[size]
    return LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=hidden, num_hidden_layers=layers or all_layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, intermediate_size=intermediate, max_position_embeddings=2048,
    )  # fmt: skip


def _plan_of(size: str, way: Way, rank: int, layers: int) -> Plan:
    config = config_of(size, layers)
    given: dict[str, Any] = {} if way.method == "full" else {"rank": rank}
    options = PlanOptions(
        model=size, method=way.method, storage=way.storage, batch_size=1, max_length=_LENGTH, device=CUDA,
        gradient_checkpointing=True, **given,
    )  # fmt: skip
    return plan(options, NO_MACHINE, base=Base(size, config, "causal", way.storage, 64, True, way.dense))
