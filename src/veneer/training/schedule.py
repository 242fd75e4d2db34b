"""The learning rate of a step."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, highest: float, schedule: str, warmup: float) -> float:
    """The rate for step ``step`` (from 0) of ``total``: linear warm-up, then constant, or down to zero after the last.

    ``warmup``: a share of all steps below 1, else a number of steps.
    """
    warm = round(warmup * total) if warmup < 1 else round(warmup)
    if step < warm:
        return highest * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if schedule == "linear":
        return highest * (1 - done)
    if schedule == "cosine":
        return highest * (1 + math.cos(math.pi * done)) / 2
    return highest
