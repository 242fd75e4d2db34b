"""Which tokens may be chosen: the values of transformers' LogitsProcessors."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

import veneer
from veneer.generation.choice import Forbidden, among_likeliest, penalised, without
from veneer.generation.sampling import Sampler

pytestmark = pytest.mark.unit
TOKENS = [3, 7, 3, 49, 11]


def _logits(seed, size=50):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def _by_theirs(logits, *processors):
    return LogitsProcessorList(processors)(torch.tensor([TOKENS]), logits[None].clone())[0]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_the_repetition_penalty(penalty):
    for seed in range(5):
        logits = _logits(seed)
        wanted = _by_theirs(logits, theirs.RepetitionPenaltyLogitsProcessor(penalty))
        assert torch.equal(penalised(logits, TOKENS, penalty), wanted)
    assert torch.equal(penalised(logits, [], penalty), logits)
    assert torch.equal(penalised(logits, [999], penalty), logits), "a token without a logit"


@pytest.mark.parametrize(
    "cut", [{"top_k": 1}, {"top_k": 7}, {"top_k": 500}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 1e-6},
            {"min_p": 0.05}, {"min_p": 1.0}, {"top_k": 20, "top_p": 0.8, "min_p": 0.02}],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_what_is_cut_off(cut, temperature):
    made = {"top_k": theirs.TopKLogitsWarper, "top_p": theirs.TopPLogitsWarper, "min_p": theirs.MinPLogitsWarper}
    warpers = [theirs.TemperatureLogitsWarper(temperature), *(made[name](value) for name, value in cut.items())]
    for seed in range(10):
        wanted = _by_theirs(_logits(seed), *warpers)
        mine = among_likeliest(_logits(seed) / temperature, **cut)
        assert torch.equal(mine, wanted), f"seed {seed}"
        assert mine.isfinite().any()


def test_a_sampler_draws_from_what_their_processors_leave():
    forbidden = Forbidden(always=(1, 2), at_start=(9,), sequences=((49, 11, 5), (11, 6), (3, 8), (13,)))
    processors = [
        theirs.RepetitionPenaltyLogitsProcessor(1.2),
        theirs.NoBadWordsLogitsProcessor([[49, 11, 5], [11, 6], [3, 8], [13]], torch.tensor([0])),
        theirs.SuppressTokensLogitsProcessor([1, 2]),
        theirs.SuppressTokensAtBeginLogitsProcessor([9], len(TOKENS)),
        theirs.TemperatureLogitsWarper(1.7), theirs.TopKLogitsWarper(30), theirs.TopPLogitsWarper(0.95),
        theirs.MinPLogitsWarper(0.01),
    ]  # fmt: skip
    logits = _logits(3) / 2
    wanted = _by_theirs(logits, *processors).softmax(0)
    assert (wanted == 0).sum() > 5
    count = 4000
    drawn = torch.zeros(50)
    for seed in range(count):
        sampler = Sampler(
            1.7, seed, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.2, forbidden=forbidden, before=TOKENS
        )
        drawn[sampler.draw(logits)] += 1
    assert (drawn[wanted == 0] == 0).all()
    assert ((drawn / count - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / count).sqrt()).all()


def test_greedy_follows_the_penalty_and_what_is_forbidden():
    logits = torch.tensor([0.0, 4.0, 3.0, 2.9, 1.0])
    assert Sampler(0, 0, forbidden=Forbidden(always=(1,))).draw(logits) == 2
    penalised_one = Sampler(0, 0, repetition_penalty=2.0)
    assert [penalised_one.draw(logits) for _ in range(4)] == [1, 2, 3, 1]
    starting = Sampler(0, 0, forbidden=Forbidden(at_start=(1,), sequences=((1, 1, 1),)))
    assert [starting.draw(logits) for _ in range(5)] == [2, 1, 1, 2, 1]
    given = Sampler(0, 0, forbidden=Forbidden(at_start=(1,), given=4))
    assert [given.draw(logits) for _ in range(3)] == [4, 2, 1], "what comes first is not chosen; the start is after it"
    with pytest.raises(veneer.VeneerError, match=r"^The model's generation_config\.json forbids every token"):
        Sampler(0, 0, forbidden=Forbidden(always=(0, 1, 2, 3, 4))).draw(logits)


def test_tokens_beyond_the_logits_are_none_to_forbid():
    assert torch.equal(without(torch.zeros(3), [1, 5, -1]), torch.tensor([0.0, -math.inf, 0.0]))


def test_a_tiny_temperature_is_greedy():
    assert Sampler(1e-320, 0).draw(torch.tensor([1.0, 3.0, 2.9])) == 1
