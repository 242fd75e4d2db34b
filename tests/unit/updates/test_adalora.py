"""AdaLoRA's steps against an independent transcription of the paper's equations, in float64, a matrix at a time."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import veneer
from veneer.updates.budget import Schedule
from veneer.updates.importance import most_important

pytestmark = pytest.mark.unit

STEPS, RANK, TARGET = 30, 4, 2


def _model(seed: int = 0) -> nn.Sequential:
    """Three layers of different shapes, one of them square, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = {"first": nn.Linear(6, 9), "act": nn.Tanh(), "second": nn.Linear(9, 9), "third": nn.Linear(9, 5)}
        model = nn.Sequential()
        for name, layer in layers.items():
            model.add_module(name, layer)
    return model.double()


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return (
        torch.randn(8, 6, generator=generator, dtype=torch.float64),
        torch.randn(8, 5, generator=generator, dtype=torch.float64),
    )


class Paper:
    """Algorithm 1 of arXiv:2303.10512, written from its text: dense ΔW, autograd for the regulariser, loops."""

    def __init__(self, model, start, *, first, last, interval, gamma, form, after, scale):
        self.weights = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model if hasattr(m, "weight")]
        self.triplets = [[p.clone().requires_grad_() for p in triplet] for triplet in start]
        self.flat = [p for triplet in self.triplets for p in triplet]
        self.optimizer = torch.optim.Adam(self.flat, lr=0.02)
        self.smooth = [torch.zeros_like(p) for p in self.flat]
        self.unsure = [torch.zeros_like(p) for p in self.flat]
        self.first, self.last, self.interval = first, last, interval
        self.gamma, self.form, self.after, self.scale = gamma, form, after, scale
        self.kept = [[True] * RANK for _ in self.triplets]

    def loss(self, x, y):
        hidden = x
        for i, ((weight, bias), (P, lam, Q)) in enumerate(zip(self.weights, self.triplets, strict=True)):
            hidden = hidden @ (weight + self.scale * P @ torch.diag(lam[:, 0]) @ Q).T + bias
            hidden = torch.tanh(hidden) if i == 0 else hidden
        return (hidden - y).square().mean()

    def regulariser(self):
        one = torch.eye(RANK, dtype=torch.float64)
        terms = [m for P, _, Q in self.triplets for m in (P.T @ P - one, Q @ Q.T - one)]
        if self.form == "squared":
            return self.gamma * sum((term**2).sum() for term in terms)
        return self.gamma * sum((term**2).sum().sqrt() for term in terms) / len(terms)

    def budget(self, t):
        start, end = RANK * len(self.triplets), TARGET * len(self.triplets)
        if t <= self.first:
            return start
        if t > self.last:
            return end
        return int(end + (start - end) * (1 - (t - self.first) / (self.last - self.first)) ** 3)

    def learn(self, weights, beta=0.85):
        for i, (w, p) in enumerate(zip(weights, self.flat, strict=True)):
            now = (w * p.grad).abs()
            self.smooth[i] = beta * self.smooth[i] + (1 - beta) * now
            self.unsure[i] = beta * self.unsure[i] + (1 - beta) * (now - self.smooth[i]).abs()

    def scores(self):
        s = [a * b for a, b in zip(self.smooth, self.unsure, strict=True)]
        return {
            (k, i): float(s[3 * k + 1][i, 0] + s[3 * k][:, i].mean() + s[3 * k + 2][i].mean())
            for k in range(len(self.triplets))
            for i in range(RANK)
        }

    def step(self, t):
        """After the final allocation λ of what was taken stays zero, as the paper's mask keeps it."""
        self.optimizer.zero_grad()
        (self.loss(*_batch(t)) + self.regulariser()).backward()
        before = [p.detach().clone() for p in self.flat]
        self.optimizer.step()
        if not (self.after and t == self.last):  # peft's allocator decides at the last step without having looked at it
            self.learn([p.detach() for p in self.flat] if self.after else before)
        if self.first < t <= self.last and (t % self.interval == 0 or t == self.last):
            scores = self.scores()
            best = sorted(scores, key=lambda place: -scores[place])[: self.budget(t)]
            self.kept = [[(k, i) in best for i in range(RANK)] for k in range(len(self.triplets))]
            with torch.no_grad():
                for (_, lam, _), flags in zip(self.triplets, self.kept, strict=True):
                    lam[~torch.tensor(flags)] = 0


def _pair(**options):
    """The same start for both: Veneer's model, and the transcription."""
    plain = _model()
    model = copy.deepcopy(plain)
    schedule = {"total_steps": STEPS, "tinit": 4, "tfinal": 8}
    config = veneer.AdaLoRA(
        initial_rank=RANK, target_rank=TARGET, alpha=6, orthogonality=0.2, **schedule, **options
    )  # fmt: skip
    torch.manual_seed(1)
    veneer.attach(model, config)
    allocator = veneer.allocator(model)
    with torch.no_grad():
        for update in allocator.triplets.values():
            update.lam.normal_(std=0.3)
    start = [[p.detach().clone() for p in (u.P, u.lam, u.Q)] for u in allocator.triplets.values()]
    paper = Paper(
        plain, start, first=4, last=STEPS - 8, interval=config.delta_t, gamma=0.2, form=config.orthogonality_form,
        after=config.sensitivity == "after", scale=6 / RANK,
    )  # fmt: skip
    return model, allocator, paper


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("form", ["squared", "mean-norm"])
@pytest.mark.parametrize("sensitivity", ["before", "after"])
def test_every_step_is_the_papers(interval, form, sensitivity):
    model, allocator, paper = _pair(delta_t=interval, orthogonality_form=form, sensitivity=sensitivity)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    decided = 0
    for t in range(1, STEPS - 8 + 1):
        optimizer.zero_grad()
        x, y = _batch(t)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        paper.step(t)
        assert allocator.step == t
        assert allocator.kept.tolist() == paper.kept, t
        assert allocator.budget == paper.budget(t)
        decided += sum(map(sum, paper.kept)) < RANK * 3
        if t < STEPS - 8:
            scores = torch.tensor(list(paper.scores().values()), dtype=torch.float64).view(3, RANK)
            torch.testing.assert_close(allocator._importance.scores(), scores, rtol=1e-9, atol=0)
        for update, (P, lam, Q), flags in zip(allocator.triplets.values(), paper.triplets, paper.kept, strict=True):
            rows = torch.tensor(flags) if allocator.fixed else torch.ones(RANK, dtype=torch.bool)
            torch.testing.assert_close(update.P, P[:, rows], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(update.lam, lam[rows], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(update.Q, Q[rows], rtol=1e-9, atol=1e-12)
    assert allocator.fixed
    assert decided >= (18 if interval == 1 else 4)
    assert sum(update.rank for update in allocator.triplets.values()) == TARGET * 3


def test_a_triplet_that_was_taken_can_come_back():
    model, allocator, _ = _pair()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    history = []
    for t in range(1, STEPS - 8):
        optimizer.zero_grad()
        x, y = _batch(t)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        history.append(allocator.kept)
    assert any(bool((later & ~earlier).any()) for earlier, later in itertools.pairwise(history))


@given(
    target=st.integers(1, 50), more=st.integers(0, 50), first=st.integers(0, 20), taking=st.integers(1, 40),
    final=st.integers(0, 20), interval=st.integers(1, 9),
)  # fmt: skip
def test_a_budget_only_falls_and_is_met_when_the_ranks_are_fixed(target, more, first, taking, final, interval):
    schedule = Schedule(target + more, target, first, first + taking, interval)
    budgets = [schedule.budget(t) for t in range(1, first + taking + final + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert all(target <= budget <= target + more for budget in budgets)
    assert budgets[first + taking - 1] == target
    assert schedule.allocates(first + taking)


@given(scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=6, max_size=6), count=st.integers(0, 6))
def test_exactly_as_many_as_asked_for_are_kept_and_none_below_one_that_is_not(scores, count):
    kept = most_important(torch.tensor(scores).view(2, 3), torch.ones(2, dtype=torch.long), count).flatten()
    assert int(kept.sum()) == count
    taken = [score for score, flag in zip(scores, kept.tolist(), strict=True) if not flag]
    assert all(score >= max(taken, default=0) for score, flag in zip(scores, kept.tolist(), strict=True) if flag)


def test_the_schedule_is_cubic_between_its_phases():
    schedule = Schedule(initial=120, target=80, first=10, last=90, interval=4)
    assert [schedule.budget(t) for t in (1, 10, 90, 91, 100)] == [120, 120, 80, 80, 80]
    assert schedule.budget(50) == int(80 + 40 * 0.5**3)
    assert [t for t in range(1, 101) if schedule.allocates(t)] == [*range(12, 90, 4), 90]
