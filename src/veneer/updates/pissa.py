"""A and B that begin as the weight's own largest directions, which the base is then without.

PiSSA: Meng et al., 2024, arXiv:2404.02948.

Over a dense base no weight is changed: W − s · B0 A0 is computed as W and an update that is subtracted, so that other
adapters, and the base's own answers, stay right. What is saved is the whole change, s · (B A − B0 A0), a plain LoRA of
twice the rank over the base as everybody has it. Over codes the weight without these directions is what is quantised,
with a smaller error; the base then is another one, and is saved, too (base_file.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.errors import TargetError
from veneer.frozen.blockwise import quantise
from veneer.frozen.weight import QuantisedLinear, frozen_weight
from veneer.models.bnb_file import TYPES
from veneer.models.original import OriginalWeights
from veneer.updates.config import LoRA
from veneer.updates.layers import Pair, new_factors
from veneer.updates.loftq import Start, best_factors, original
from veneer.updates.product import Factors
from veneer.updates.select import Chosen

PARTS = ("lora_A.weight", "lora_B.weight")


class Pissa(Pair):
    """ΔW = s · (B A − B0 A0): A and B begin as ``A0`` (rank, in) and ``B0`` (out, rank), which stay."""

    A0: Tensor
    B0: Tensor

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(A, B, scale, dropout)
        self.register_buffer("A0", A.clone())
        self.register_buffer("B0", B.clone())

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and −A0 below each other (2 · rank, in), B and B0 beside each other (out, 2 · rank)."""
        return torch.cat([self.A, -self.A0]), torch.cat([self.B, self.B0], 1)

    def factors(self) -> list[Factors]:
        return [Factors(self.A, self.B, self.scale, self.drops), Factors(self.A0, self.B0, -self.scale)]

    def written(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """`matrices` with these values for A and B."""
        return torch.cat([A, -self.A0.to(A)]), torch.cat([B, self.B0.to(B)], 1)

    @torch.no_grad()
    def take(self, A: Tensor, B: Tensor) -> None:
        """Put back what was `written`."""
        rank = self.rank
        for own, value in ((self.A, A[:rank]), (self.A0, -A[rank:]), (self.B, B[:, :rank]), (self.B0, B[:, rank:])):
            own.copy_(value)


def principal(base: nn.Module, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with s · B A nearest to ``weight`` (out, in) of ``base``; where the rank is larger
    than the weight has directions, the others begin as usual, with B zero."""
    A, B = new_factors(base, rank, "kaiming")
    found_A, found_B = best_factors(weight, rank)
    count = len(found_A)
    with torch.no_grad():
        A[:count], B[:, :count] = found_A / scale**0.5, found_B / scale**0.5
    return A, B


def new_pissa(chosen: Chosen, dropout: float) -> Pissa:
    """The update of a linear layer that is kept dense."""
    weight = frozen_weight(chosen.module).dense().detach().float()
    return Pissa(*principal(chosen.module, weight, chosen.rank, chosen.scale), chosen.scale, dropout)


def pissa_starts(model: nn.Module, chosen: list[Chosen]) -> dict[str, Start]:
    """Module name → where it starts, for layers in codes, with the codes of what is left of its weight; nothing for
    dense ones. Raises TargetError where there are both, a layer is no linear one, or the changed base could not be
    saved; as `loftq_starts` for the rest."""
    coded = [c for c in chosen if isinstance(c.module, QuantisedLinear)]
    embedding = next((c.name for c in chosen if isinstance(c.module, nn.Embedding)), None)
    if embedding is not None:
        raise TargetError(f"{embedding} is an Embedding, and init = 'pissa' is for linear layers; leave it out.")
    if coded and len(coded) < len(chosen):
        dense = next(c.name for c in chosen if c not in coded)
        raise TargetError(
            f"init = 'pissa' changes layers in codes and not dense ones, so an adapter has one kind; {dense} is dense "
            f"here: leave it out with exclude."
        )
    for c in coded:
        assert isinstance(c.module, QuantisedLinear)
        if c.module.storage not in TYPES:
            raise TargetError(
                f"init = 'pissa' changes the base, which could not be saved in {c.module.storage}; use "
                f"{' or '.join(TYPES)}, or a dense storage."
            )
    weights = OriginalWeights(model) if coded else None
    starts = {}
    for c in coded:
        assert weights is not None
        weight, how = original(c, weights.read(c.name))
        A, B = principal(c.module, weight, c.rank, c.scale)
        starts[c.name] = Start(A, B, quantise(weight - c.scale * (B @ A), c.name, **how))
    return starts


def written_config(config: LoRA) -> LoRA:
    """The config of `Pissa.written`: twice the rank at the same scale."""
    factor = 2**0.5 if config.rslora else 2.0
    alpha = config.alpha if config.alpha is not None else 2.0 * config.rank
    return config.model_copy(
        update={
            "rank": 2 * config.rank,
            "alpha": factor * alpha,
            "rank_pattern": {name: 2 * rank for name, rank in config.rank_pattern.items()},
            "alpha_pattern": {name: factor * value for name, value in config.alpha_pattern.items()},
        }
    )
