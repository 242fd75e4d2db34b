"""The loss of rows with preferences: of each answer its log-probability, and of these DPO's, ORPO's or KTO's loss.

The reference that DPO and KTO measure against is the model as the run begins: without its new adapter, and with the one
that the run starts from. Its log-probabilities are two numbers a row, computed once before the first step: no second
model is held, and the weights themselves may be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.data.labels import Tokens
from veneer.data.pairs import Pair
from veneer.training.batches import by_length
from veneer.training.config import TrainConfig
from veneer.training.dpo import dpo_loss
from veneer.training.kto import kto_divergence, kto_loss
from veneer.training.loss import How, Loss, Measured
from veneer.training.orpo import odds_ratio_loss


class Preference(NamedTuple):
    """What is compared, and how strongly."""

    objective: str  # dpo, orpo or kto
    beta: float
    weights: tuple[float, float] = (1.0, 1.0)  # of good and bad answers, in KTO

    @property
    def has_reference(self) -> bool:
        """Whether answers are measured against the model as it was."""
        return self.objective != "orpo"


def preference_of(config: TrainConfig, rows: Sequence[Tokens]) -> Preference | None:
    """What a run over these rows compares; None where it learns their likelihood. Where ``config`` leaves it to the
    rows, pairs are for dpo, and judged answers for kto."""
    first = rows[0]
    if not isinstance(first, Pair):
        return None
    by_rows = "dpo" if first.desirable is None else "kto"
    objective = by_rows if config.objective == "auto" else config.objective
    return Preference(objective, config.beta, (config.desirable_weight, config.undesirable_weight))


def loss_of(likelihood: Loss, preference: Preference | None, model: Any, reference: Tensor) -> Loss | PreferenceLoss:
    """The loss of a run, over its model's ``likelihood``."""
    return likelihood if preference is None else PreferenceLoss(likelihood, preference, model, reference)


class _Step(NamedTuple):
    """What the shares of a step's parts have in common."""

    rows: int
    tokens: int  # of the first answers
    divergence: Tensor


class PreferenceLoss:
    """The mean loss of pairs, over one model's `Loss`.

    ``reference`` (rows of the run, 2): the log-probability of each row's first and second answer before training, fp64;
    NaN where it is not computed yet.
    """

    def __init__(self, likelihood: Loss, preference: Preference, model: Any, reference: Tensor) -> None:
        self._likelihood, self._preference, self._model = likelihood, preference, model
        self.reference = reference

    @property
    def kind(self) -> str:
        return self._likelihood.kind

    @property
    def how(self) -> How:
        return self._likelihood.how

    @property
    def has_reference(self) -> bool:
        """Whether answers are measured against the model as it was."""
        return self._preference.has_reference

    def attention(self) -> AbstractContextManager[None]:
        """As of the likelihood."""
        return self._likelihood.attention()

    def of_step(self, parts: Sequence[list[Tokens]]) -> Callable[[list[Tokens]], Tensor]:
        """For the parts of a step, what gives each part's share of the step's mean loss: how rows are parted does not
        change it."""
        step = self._step([_pairs(part) for part in parts])
        return lambda part: self._share(self._scores(_pairs(part)), _pairs(part), step)

    def held_out(self, rows: Sequence[Tokens], batch_size: int) -> Measured:
        """The mean loss of all rows, how many of the better answers have the higher reward, and by how much."""
        parts = [_pairs(part) for part in by_length(rows, batch_size)]
        with torch.no_grad(), _in_eval_mode(self._model):
            step = self._step(parts)
            scores = [self._scores(part) for part in parts]
        loss = sum(float(self._share(*each, step)) for each in zip(scores, parts, strict=True))
        first, second = (torch.cat(side).cpu() for side in zip(*scores, strict=True))
        if self._preference.objective != "kto":
            return Measured(loss, *_ahead(first - second, self._preference.beta))
        good = torch.tensor([bool(pair.desirable) for part in parts for pair in part])
        right, _ = _ahead(torch.where(good, 1.0, -1.0) * (first - step.divergence.cpu()), 1.0)
        both = bool(good.any()) and not bool(good.all())
        margin = self._preference.beta * float(first[good].mean() - first[~good].mean()) if both else None
        return Measured(loss, right, margin)

    def without_reference(self, rows: Iterable[Tokens]) -> int:
        """How many of the rows have no reference yet."""
        return int(self.reference[[pair.number for pair in _pairs(list(rows))]].isnan().any(1).sum())

    @torch.no_grad()
    def refer(self, parts: Iterable[list[Tokens]]) -> None:
        """Compute the reference of these rows, part by part, where it is missing: the model is the reference now."""
        with _in_eval_mode(self._model):
            for part in parts:
                missing = [pair for pair in _pairs(part) if self.reference[pair.number].isnan().any()]
                if missing:
                    found = self._likelihood.log_probabilities(_both(missing)).view(2, -1).T.cpu()
                    self.reference[[pair.number for pair in missing]] = found

    def _step(self, parts: Sequence[list[Pair]]) -> _Step:
        pairs = [pair for part in parts for pair in part]
        divergence = torch.zeros((), dtype=torch.float64)
        if self._preference.objective == "kto":
            with torch.no_grad(), _in_eval_mode(self._model):
                others = ([pair.second for pair in part] for part in parts)
                found = torch.cat([self._likelihood.log_probabilities(answers) for answers in others])
            divergence = kto_divergence(found - self._referred(pairs, found)[:, 1])
        return _Step(len(pairs), sum(pair.first.learned for pair in pairs), divergence)

    def _scores(self, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        """What is compared, (rows,) of the first answers and of the second: a log-probability less the reference's, or
        in ORPO the mean of the tokens'. KTO has no second."""
        if self._preference.objective == "kto":
            found = self._likelihood.log_probabilities([pair.first for pair in pairs])
            return found - self._referred(pairs, found)[:, 0], found[:0]
        answers = _both(pairs)
        found = self._likelihood.log_probabilities(answers)
        if self._preference.objective == "orpo":
            first, second = (found / found.new_tensor([answer.learned for answer in answers])).chunk(2)
            return first, second
        first, second = (found.view(2, -1) - self._referred(pairs, found).T).unbind()
        return first, second

    def _share(self, scores: tuple[Tensor, Tensor], pairs: list[Pair], step: _Step) -> Tensor:
        first, second = scores
        name, beta, weights = self._preference
        if name == "dpo":
            return dpo_loss(first, second, beta).sum() / step.rows
        if name == "orpo":
            likelihood = (first * first.new_tensor([pair.first.learned for pair in pairs])).sum() / step.tokens
            return beta * odds_ratio_loss(first, second).sum() / step.rows - likelihood
        good = torch.tensor([bool(pair.desirable) for pair in pairs], device=first.device)
        return kto_loss(first, good, step.divergence.to(first), beta, weights).sum() / step.rows

    def _referred(self, pairs: list[Pair], like: Tensor) -> Tensor:
        """The reference of the rows (rows, 2), beside ``like``."""
        return self.reference[[pair.number for pair in pairs]].to(like)


def _ahead(differences: Tensor, beta: float) -> tuple[float, float]:
    """The share of positive differences, half for those of 0; and their mean, times ``beta``."""
    return float((differences.sign() / 2 + 0.5).mean()), beta * float(differences.mean())


def _pairs(rows: Sequence[Tokens]) -> list[Pair]:
    pairs = [row for row in rows if isinstance(row, Pair)]
    assert len(pairs) == len(rows)
    return pairs


def _both(pairs: list[Pair]) -> list[Tokens]:
    """All first answers, and then all second ones."""
    return [pair.first for pair in pairs] + [pair.second for pair in pairs]


@contextmanager
def _in_eval_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
