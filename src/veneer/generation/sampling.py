"""A token from logits: the likeliest, or one drawn from a generator that belongs to one prompt alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.device import exact_dtype
from veneer.errors import ModelError
from veneer.generation.choice import Forbidden, among_likeliest, penalised, without

_ALL = Forbidden()


class Sampler:
    """How the tokens of one prompt are chosen. ``temperature`` 0 is greedy; above it the tokens are a function of the
    prompt's own logits and ``seed``, whatever else is generated beside it. The others are as in `SamplingOptions`;
    ``before``: the tokens that the penalty counts besides the answer's own."""

    def __init__(
        self, temperature: float, seed: int, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, forbidden: Forbidden = _ALL, before: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.temperature = temperature
        self._cut = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        self._penalty, self._forbidden = repetition_penalty, forbidden
        self._tokens, self._said = list(before), 0
        self._generator = torch.Generator().manual_seed(seed) if temperature > 0 else None
        self.takes_likeliest = temperature == 0 and repetition_penalty == 1 and forbidden == _ALL

    def draw(self, logits: Tensor) -> int:
        """The next token of the answer, for logits (vocabulary,): after the penalty and without what is forbidden the
        likeliest, or token i with probability softmax(logits / temperature)[i], of those that are cut off none.

        One uniform number a token, looked up among the probabilities' sums. Raises ModelError where they have none.
        """
        refuse_no_numbers(logits.max().isfinite())
        token = self._chosen(logits) if self._said or self._forbidden.given is None else self._forbidden.given
        self._tokens.append(token)
        self._said += 1
        return token

    def _chosen(self, logits: Tensor) -> int:
        scores = penalised(logits.float(), self._tokens, self._penalty)
        scores = without(scores, self._forbidden.after(self._tokens, self._said))
        best = scores.max()
        if not best.isfinite():
            raise ModelError("The model's generation_config.json forbids every token, so none can follow.")
        if self._generator is None:
            return int(scores.argmax())
        exact = exact_dtype(scores.device)
        scores = among_likeliest((scores.to(exact) - best.to(exact)) / self.temperature, **self._cut)  # type: ignore[arg-type]
        sums = scores.softmax(-1).cumsum(-1)
        place = torch.rand((), generator=self._generator, dtype=torch.float64).to(sums) * sums[-1]
        return min(int(torch.searchsorted(sums, place, right=True)), len(sums) - 1)


def draw(logits: Tensor, samplers: list[Sampler]) -> list[int]:
    """A token for each row of logits (samplers, vocabulary), by its own sampler. Raises ModelError as these do."""
    best, likeliest = logits.max(-1)
    refuse_no_numbers(best.isfinite())
    tokens: list[int] = likeliest.tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.takes_likeliest:
            tokens[row] = sampler.draw(logits[row])
    return tokens


def refuse_no_numbers(right: Tensor) -> None:
    """Raises ModelError where ``right`` (bool) is False: logits there are NaN or infinite."""
    if not right.all():
        raise ModelError(
            "The model's logits are not finite, so there is no answer: a weight is NaN or infinite, or a number has "
            "overflowed; look at where the model comes from, or load it in fp32."
        )
