"""Logits → what tokens may be drawn from: the processing of transformers' LogitsProcessors, for one sequence.

All functions take logits of one row (vocabulary,) and give new ones; a token that cannot be chosen has -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Forbidden:
    """Token ids that a model's own settings forbid, or give at the start of an answer."""

    always: tuple[int, ...] = ()
    at_start: tuple[int, ...] = ()  # as the first token that is chosen
    sequences: tuple[tuple[int, ...], ...] = ()  # the last token of each, where the others stand before it
    given: int | None = None  # the answer's first token, which is not chosen

    def after(self, tokens: Sequence[int], said: int) -> list[int]:
        """What cannot follow ``tokens``, the last ``said`` of which are the answer so far."""
        ended = [
            last for *before, last in self.sequences
            if not before or list(tokens[-len(before) :]) == before
        ]  # fmt: skip
        start = said == (0 if self.given is None else 1)
        return [*self.always, *(self.at_start if start else ()), *ended]


def penalised(logits: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Each of ``tokens`` once: a positive logit divided by ``penalty``, a negative one multiplied by it."""
    ids = _known(tokens, logits)
    if penalty == 1 or not len(ids):
        return logits
    old = logits[ids]
    return logits.index_copy(0, ids, torch.where(old < 0, old * penalty, old / penalty))


def without(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """No token of ``tokens`` can be chosen."""
    ids = _known(tokens, logits)
    return logits.index_fill(0, ids, -math.inf) if len(ids) else logits


def _known(tokens: Sequence[int], logits: Tensor) -> Tensor:
    """The ids of ``tokens`` that have a logit."""
    ids = sorted({token for token in tokens if 0 <= token < len(logits)})
    return torch.tensor(ids, dtype=torch.int64, device=logits.device)


def among_likeliest(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The ``top_k`` likeliest; of these the fewest that have ``top_p`` of their probability; of these the ones that
    have ``min_p`` of the likeliest one's. 0, 1 and 0 keep all."""
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    if top_p < 1:
        ids = logits.isfinite().nonzero()[:, 0]
        values, order = logits[ids].sort()
        unlikely = values.softmax(0).cumsum(0) <= 1 - top_p
        unlikely[-1] = False
        logits = logits.index_fill(0, ids[order[unlikely]], -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.max() + math.log(min_p), -math.inf)
    return logits
