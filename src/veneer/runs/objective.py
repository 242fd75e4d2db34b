"""The objective of a run, as asked or by its rows; and its rows as tokens.

Rows with preferences are never learned as if all their answers were good.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from veneer.data.bad import BadRows
from veneer.data.formats import Example, counted_rows
from veneer.data.kept import those_of
from veneer.data.labels import Renderer
from veneer.data.pairs import Watched
from veneer.data.report import Report
from veneer.data.token_cache import kept_pairs, kept_tokens
from veneer.data.token_rows import TokenRows
from veneer.errors import ConfigError, DataError
from veneer.training.config import TrainConfig

_MORE = 4 / 3  # that good answers may weigh in KTO, times bad ones
_NEEDS = {
    "dpo": "compares a chosen and a rejected answer",
    "orpo": "compares a chosen and a rejected answer",
    "kto": "needs answers that are labelled good or bad (prompt, completion and a label true or false; or chosen and "
    "rejected)",
}


def objective_of(config: TrainConfig, train: Sequence[Example], held_out: Sequence[Example], kind: str) -> str:
    """The objective that the options name, or that the rows are for.

    Raises DataError for rows that are not for it, or whose model is no ``kind`` that compares answers, and ConfigError
    for options that it has not.
    """
    objective: str = config.objective
    if objective == "auto":
        first = train[0]
        objective = "dpo" if first.rejected is not None else "kto" if first.is_judged else "likelihood"
    if objective != "likelihood" and kind != "causal":
        raise ConfigError(f"objective: {objective} trains models that go on with a text, and this one is for {kind}.")
    if objective in _NEEDS:
        other = next((row for row in chain(train, held_out) if not _is_for(objective, row)), None)
        if other is not None:
            raise DataError(f"{other.where} has one answer, and objective: {objective} {_NEEDS[objective]}.")
    try:
        config.refuse_other_objectives(objective)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return objective


def _is_for(objective: str, row: Example) -> bool:
    return row.is_judged if objective == "kto" else row.rejected is not None


def in_tokens(
    renderer: Renderer, examples: Sequence[Example], objective: str, first: int = 0, watched: Watched = iter,
    bad: BadRows | None = None,
) -> tuple[TokenRows, Report]:  # fmt: skip
    """The rows as the objective takes them, numbered from ``first`` where that is by number; and what became of the
    others. Raises DataError where none has a token to learn."""
    if objective == "likelihood":
        return kept_tokens(renderer, good_ones(examples), watched, bad)
    if bad is not None:
        examples = renderer.usable(examples, bad)
    return kept_pairs(renderer, examples, first, watched, judged=objective == "kto")


def good_ones(examples: Sequence[Example]) -> Sequence[Example]:
    """All but those whose answer is labelled bad. Raises DataError where none is left."""
    good = [number for number, example in enumerate(examples) if example.desirable is not False]
    if not good:
        raise DataError(f"All {len(examples)} rows are labelled false; there is no good answer to learn.")
    return examples if len(good) == len(examples) else those_of(examples, good)


def refuse_judged(examples: Iterable[Example], what: str) -> None:
    """Raises DataError for rows with preferences, which ``what`` cannot be trained on."""
    for example in examples:
        if example.is_judged:
            raise DataError(f"{example.where} says which answer is better, and {what} learns none of that.")


def notes_of(config: TrainConfig, objective: str, train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    """What the objective does to the rows, and what KTO's weights should be for them, as sentences."""
    if objective == "likelihood":
        return likelihood_notes(chain(train, held_out))
    return kto_notes(config, train) if objective == "kto" else []


def kto_notes(config: TrainConfig, train: Sequence[Example]) -> list[str]:
    """A sentence where good and bad answers do not weigh alike: the paper (section 4.2) and trl want good ones to weigh
    as much as bad ones, up to a third more."""
    pairs = sum(row.rejected is not None for row in train)
    good = pairs + sum(bool(row.desirable) for row in train)
    bad = pairs + sum(row.desirable is False for row in train)
    if not good or not bad:
        return [f"All answers are {'good' if good else 'bad'} ones; KTO learns little from one kind."]
    share = config.desirable_weight * good / (config.undesirable_weight * bad)
    if 1 <= share <= _MORE:
        return []
    least = config.undesirable_weight * bad / good
    return [
        f"{good:,} good and {bad:,} bad answers: with the weights {config.desirable_weight:g} and "
        f"{config.undesirable_weight:g} they do not weigh alike. KTO's authors would take a desirable_weight from "
        f"{least:.2g} to {_MORE * least:.2g}."
    ]


def likelihood_notes(examples: Iterable[Example]) -> list[str]:
    """What objective: likelihood does to rows with preferences, as sentences."""
    judged = [(example.where, example.desirable) for example in examples if example.is_judged]
    pairs = [where for where, desirable in judged if desirable is None]
    bad = [where for where, desirable in judged if desirable is False]
    said = [f"{counted_rows(pairs)} with two answers: the chosen one is learned, the rejected one is not used."]
    left = [f"{counted_rows(bad)} left out, because the label says that the answer is bad."]
    return said * bool(pairs) + left * bool(bad)
