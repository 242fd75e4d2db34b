"""The losses of preferences: at values known from their formulas, in parts of any size, and on every kind of model."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
import veneer
import veneer.training.loss as loss_module
from veneer.data.labels import IGNORE, Tokens
from veneer.data.pairs import Pair
from veneer.training.config import TrainConfig
from veneer.training.dpo import dpo_loss
from veneer.training.kto import kto_divergence, kto_loss
from veneer.training.loss import How, Loss
from veneer.training.orpo import log_odds, odds_ratio_loss
from veneer.training.preference import Preference, PreferenceLoss, preference_of

pytestmark = pytest.mark.unit


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_formulas_at_known_values():
    chosen, rejected = torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 2.5])
    wanted = [-math.log(sigmoid(0.5 * 2.0)), -math.log(sigmoid(0.5 * -0.5))]
    torch.testing.assert_close(dpo_loss(chosen, rejected, 0.5), torch.tensor(wanted))
    good = torch.tensor([True, False])
    wanted = [1.5 * (1 - sigmoid(0.5 * (-1.0 - 0.25))), 0.5 * (1 - sigmoid(0.5 * (0.25 - 2.0)))]
    torch.testing.assert_close(kto_loss(chosen, good, torch.tensor(0.25), 0.5, (1.5, 0.5)), torch.tensor(wanted))
    assert kto_divergence(torch.tensor([1.0, -0.5])) == 0.25
    assert kto_divergence(torch.tensor([-1.0, 0.5])) == 0.0
    p, q = 0.8, 0.3
    odds = math.log((p / (1 - p)) / (q / (1 - q)))
    got = odds_ratio_loss(torch.tensor([p]).log(), torch.tensor([q]).log())
    torch.testing.assert_close(got, torch.tensor([-math.log(sigmoid(odds))]))


@pytest.mark.parametrize("value", [-1e-9, -1e-3, -0.6931, -0.7, -40.0, -800.0])
def test_log_odds_and_their_gradient_are_exact_at_either_end(value):
    x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    odds = log_odds(x)
    odds.backward()
    assert odds.item() == pytest.approx(value - math.log(-math.expm1(value)), rel=1e-12)
    assert float(x.grad) == pytest.approx(1 / -math.expm1(value), rel=1e-9)  # d/dx of x − log(1 − eˣ)


def pairs(judged=False):
    generator = torch.Generator().manual_seed(2)

    def side(prompt, length):
        ids = torch.randint(1, tiny.VOCABULARY, (prompt + length,), generator=generator).tolist()
        return Tokens(ids, [IGNORE] * prompt + ids[prompt:], "d:1")

    made = []
    for number, (prompt, first, second) in enumerate(((3, 4, 2), (1, 2, 5), (4, 6, 3), (2, 1, 1), (5, 3, 4))):
        pair = Pair.of(side(prompt, first), side(prompt, second), number % 2 == 0 if judged else None)
        made.append(Pair(pair.ids, pair.labels, pair.where, pair.border, number, pair.desirable))
    return made


def plain_log_probabilities(model, rows):
    """One row at a time, all logits at once."""
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        found.append(sum(logits[i, label] for i, label in enumerate(row.labels[1:]) if label != IGNORE))
    return torch.stack(found)


# OPT pads its rows; the others take them back to back.
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt"])
@pytest.mark.parametrize("how", [None, How(chunked=False, packed=False), How(chunked=True, packed=False)])
def test_log_probabilities_and_gradients_on_any_way_to_them(name, how, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK", 3 * tiny.VOCABULARY)  # several chunks
    model = tiny.build(name)
    rows = [side for pair in pairs() for side in (pair.first, pair.second)]
    weights = torch.arange(1.0, 11.0)
    (plain_log_probabilities(model, rows) * weights).sum().backward()
    wanted = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    got = Loss(model, 0, rows[0], kind="causal", how=how).log_probabilities(rows)
    torch.testing.assert_close(got.float(), plain_log_probabilities(model, rows), rtol=1e-5, atol=1e-5)
    (got * weights).sum().backward()
    for key, parameter in model.named_parameters():
        if key in wanted:
            torch.testing.assert_close(parameter.grad, wanted[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_how_a_step_is_parted_changes_nothing(objective):
    model = tiny.build("llama")
    torch.manual_seed(0)
    veneer.attach(model, veneer.LoRA(rank=2))
    rows = pairs(judged=objective == "kto")
    reference = torch.full((5, 2), math.nan, dtype=torch.float64)
    loss = PreferenceLoss(
        Loss(model, 0, rows[0].first, kind="causal"), Preference(objective, 0.5, (1.5, 0.5)), model, reference
    )
    loss.refer([rows])
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.2)

    def taken(parts):
        model.zero_grad()
        share = loss.of_step(parts)
        values = [share(part) for part in parts]
        sum(values).backward()
        return float(sum(values)), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, gradient = taken([rows])
    for parts in ([rows[:2], rows[2:]], [[row] for row in rows]):
        value, other = taken(parts)
        assert value == pytest.approx(whole, rel=1e-6)
        for one, two in zip(gradient, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    measured = loss.held_out(rows, 2)
    assert measured.loss == pytest.approx(whole, rel=1e-6)
    assert 0 <= measured.reward_accuracy <= 1


def test_rewards_of_held_out_rows():
    """By hand, from the log-probabilities: DPO's rewards are β (log πθ − log π_ref)."""
    model = tiny.build("llama")
    rows = pairs()
    first = plain_log_probabilities(model, [pair.first for pair in rows]).double()
    second = plain_log_probabilities(model, [pair.second for pair in rows]).double()
    reference = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    reference += torch.stack([first, second], 1).detach()
    loss = PreferenceLoss(Loss(model, 0, rows[0].first, kind="causal"), Preference("dpo", 0.5), model, reference)
    differences = (first - reference[:, 0]) - (second - reference[:, 1])
    measured = loss.held_out(rows, 2)
    assert measured.reward_accuracy == pytest.approx(float((differences > 0).double().mean()))
    assert measured.reward_margin == pytest.approx(0.5 * float(differences.mean()), rel=1e-4)
    untrained = torch.full((5, 2), math.nan, dtype=torch.float64)
    loss = PreferenceLoss(Loss(model, 0, rows[0].first, kind="causal"), Preference("dpo", 0.5), model, untrained)
    loss.refer([rows])
    again = loss.held_out(rows, 5)
    assert again.loss == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"objective": "likelihood", "beta": 0.5}, "beta is an option of objective: dpo or orpo or kto, and the objec"),
        ({"objective": "dpo", "desirable_weight": 2.0}, "desirable_weight is an option of objective: kto, and the obj"),
        ({"objective": "dpo", "label_smoothing": 0.1}, "label_smoothing is an option of objective: likelihood, and"),
        ({"objective": "orpo", "learn": "all"}, "learn: all would compare the prompts, too; objective: orpo compares"),
    ],
)
def test_an_option_of_another_objective_is_refused_by_name(options, match):
    with pytest.raises(veneer.VeneerError, match=match):
        TrainConfig(model="m", data="d", output="o", **options)


def test_the_rows_say_what_is_compared_where_the_options_do_not():
    config = TrainConfig(model="m", data="d", output="o", beta=0.3)
    assert preference_of(config, pairs()) == Preference("dpo", 0.3)
    assert preference_of(config, pairs(judged=True)) == Preference("kto", 0.3)
    assert preference_of(config, [pairs()[0].first]) is None
