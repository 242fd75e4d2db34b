"""A token from logits: the likeliest, or one drawn from a generator that belongs to one prompt alone."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import ModelError


class Sampler:
    """How the tokens of one prompt are chosen. ``temperature`` 0 is greedy; above it the tokens are a function of the
    prompt's own logits and ``seed``, whatever else is generated beside it."""

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature = temperature
        self._generator = torch.Generator().manual_seed(seed) if temperature > 0 else None

    def draw(self, logits: Tensor) -> int:
        """A token for logits (vocabulary,): token i with probability softmax(logits / temperature)[i].

        One uniform number a token, looked up among the probabilities' sums. Raises ModelError where they have none.
        """
        if self._generator is None:
            return int(logits.argmax())
        sums = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        if not sums[-1].isfinite():
            raise ModelError("The model's logits are not finite, so no token can be drawn from them.")
        place = torch.rand((), generator=self._generator, dtype=torch.float64).to(sums.device) * sums[-1]
        return min(int(torch.searchsorted(sums, place, right=True)), len(sums) - 1)


def draw(logits: Tensor, samplers: list[Sampler]) -> list[int]:
    """A token for each row of logits (samplers, vocabulary), by its own sampler."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, sampler in enumerate(samplers):
        if sampler.temperature > 0:
            tokens[row] = sampler.draw(logits[row])
    return tokens
