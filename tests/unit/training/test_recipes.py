"""What is recomputed has the same bits, is not kept, and is never mistaken for another tensor."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import tiny
import veneer
from veneer.data.labels import Tokens
from veneer.kernels.operations.gates import differentiable_swiglu as swiglu
from veneer.kernels.operations.norm import differentiable_rms_norm as rms_norm
from veneer.training.fused import fused_passes
from veneer.training.loss import Loss
from veneer.training.recipes import Recipes, place_of, recipes_of

pytestmark = pytest.mark.unit


class _Square(torch.autograd.Function):
    """Keeps its input, of which a product sees a view."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def _inputs():
    torch.manual_seed(0)
    return [torch.randn(8, 32, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize(
    "make", [swiglu, lambda gate, up: rms_norm(gate * up, torch.full((32,), 0.5, dtype=torch.float64), 1e-6)]
)
def test_it_is_not_kept_and_the_gradients_are_the_same(make):
    gate, up = _inputs()
    gradients = []
    for recomputed in (True, False):
        y, recipes = make(gate, up), Recipes()
        if recomputed:
            recipes.add(y, lambda: make(gate.detach(), up.detach()))
        with recipes.used():
            squares = _Square.apply(y.view(2, 4, 32))
            more = _Square.apply(y)
        (kept,) = squares.grad_fn.saved_tensors
        assert torch.equal(kept, y.view(2, 4, 32))
        assert (kept.data_ptr() == y.data_ptr()) is not recomputed
        assert (more.grad_fn.saved_tensors[0].data_ptr() == kept.data_ptr()) is True, "computed once for both"
        gradients.append(torch.autograd.grad(squares.sum() + more.sum(), [gate, up]))
    for got, wanted in zip(*gradients, strict=True):
        assert torch.equal(got, wanted)


def test_a_part_of_it_another_type_and_one_that_has_gone_are_kept():
    gate, up = _inputs()
    recipes = Recipes()
    y = recipes.add(swiglu(gate, up), lambda: pytest.fail("it was mistaken for another"))
    place = place_of(y)
    with recipes.used():
        part = _Square.apply(y[:4])
        turned = _Square.apply(y.t())
        other = _Square.apply(y.detach().view(torch.int64).double().requires_grad_())
    for output in (part, turned, other):
        assert torch.isfinite(output.grad_fn.saved_tensors[0]).all()
    del y, part, turned, other
    gc.collect()
    assert place not in recipes._recipes


def test_a_tensor_at_the_place_of_one_that_has_gone_is_no_other():
    gate, up = _inputs()
    recipes = Recipes()
    y = recipes.add(swiglu(gate, up), lambda: torch.zeros(8, 32, dtype=torch.float64))
    stale = recipes._recipes[place_of(y)]
    other = torch.ones(8, 32, dtype=torch.float64, requires_grad=True)
    del y
    gc.collect()
    recipes._recipes[place_of(other)] = stale
    with recipes.used():
        assert torch.equal(_Square.apply(other).grad_fn.saved_tensors[0], other)


def test_outside_nothing_changes_and_nothing_is_held():
    gate, up = _inputs()
    y = Recipes().add(swiglu(gate, up), lambda: pytest.fail("it is kept"))
    assert torch.equal(_Square.apply(y).grad_fn.saved_tensors[0], y)
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None


def test_a_model_in_training_keeps_neither_norms_nor_gated_products(monkeypatch):
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets="all-linear"))
    packed, pack = [], Recipes._pack
    monkeypatch.setattr(Recipes, "_pack", lambda self, kept: packed.append(pack(self, kept)) or packed[-1])
    with fused_passes(model):
        model(**tiny.batch("llama"))
    recipes = [kept for kept in packed if isinstance(kept, tuple)]
    # The inputs of queries, keys and values; of gate and up; of down.
    assert len(recipes) == (3 + 2 + 1) * len(model.model.layers)
    assert len({id(recipe) for recipe, _ in recipes}) == 3 * len(model.model.layers)


def test_attention_by_rows_is_not_kept_a_second_time_for_its_output_layer(monkeypatch):
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["o_proj"]))
    rows = [Tokens(list(range(1, length)), list(range(1, length)), "") for length in (7, 5, 9)]
    loss = Loss(model, 0, rows[0], kind="causal")
    assert loss.how.packed
    packed, pack = [], Recipes._pack
    monkeypatch.setattr(Recipes, "_pack", lambda self, kept: packed.append(pack(self, kept)) or packed[-1])
    with fused_passes(model), loss.attention():
        loss(rows).backward()
    assert sum(isinstance(kept, tuple) for kept in packed) == len(model.model.layers)


def test_the_recipes_are_the_models_own_and_go_when_it_has_trained():
    model, other = tiny.build("llama"), tiny.build("llama")
    with fused_passes(model):
        own = recipes_of(model)
        with fused_passes(other):
            assert recipes_of(other) is not own
            assert recipes_of(model) is own
        with fused_passes(model):
            assert recipes_of(model) is own
        assert recipes_of(model) is own
        assert recipes_of(other) is None
    assert recipes_of(model) is None
