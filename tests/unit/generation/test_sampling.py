"""Tokens are drawn with the probabilities of the logits, each prompt's from a generator of its own."""

from __future__ import annotations

import pytest
import torch

import veneer
from veneer.generation.sampling import Sampler, draw

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_shares_are_the_probabilities(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 0.0])
    sampler = Sampler(temperature, seed=3)
    count = 4000
    drawn = torch.tensor([sampler.draw(logits) for _ in range(count)]).bincount(minlength=5)
    wanted = (logits / temperature).softmax(-1)
    assert drawn[3] == 0
    deviation = (wanted * (1 - wanted) / count).sqrt()
    assert ((drawn / count - wanted).abs() <= 4 * deviation).all()


def test_greedy_takes_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert draw(logits, [Sampler(0, 1), Sampler(0, 1)]) == [1, 0]
    assert Sampler(0, 1).draw(logits[0]) == 1
    assert draw(logits, [Sampler(1e-9, 1), Sampler(0, 1)]) == [1, 0]


def test_rows_draw_apart():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    one = Sampler(1.0, 5)
    alone = [one.draw(logits[0]) for _ in range(8)]
    samplers = [Sampler(1.0, 5), Sampler(1.0, 6), Sampler(0, 0)]
    together = [draw(logits, samplers) for _ in range(8)]
    assert [tokens[0] for tokens in together] == alone
    assert [tokens[1] for tokens in together] != alone
    assert len(set(alone)) > 3


def test_logits_that_are_not_finite_are_a_sentence():
    with pytest.raises(veneer.VeneerError, match="logits are not finite"):
        Sampler(1.0, 0).draw(torch.tensor([0.0, torch.nan]))
