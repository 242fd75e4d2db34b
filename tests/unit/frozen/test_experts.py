"""A mixture's experts: transformers' eager forward over the same weights is the definition."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tiny
from veneer.errors import ModelError
from veneer.frozen.experts import (
    Experts,
    QuantisedStack,
    experts_of,
    own_experts,
    plain_experts,
    projections,
)
from veneer.frozen.layers import compute_in, quantise_linear_layers, storage_of, without_codes
from veneer.frozen.weight import QuantisedLinear

pytestmark = pytest.mark.unit
IDS = {"input_ids": tiny.batch("llama")["input_ids"]}


def _built(name):
    model = tiny.build(name)
    model.set_experts_implementation("eager")
    return model.requires_grad_(False)


def _gradient(model):
    x = model.get_input_embeddings()(IDS["input_ids"]).detach().requires_grad_(True)
    model(inputs_embeds=x).logits.square().sum().backward()
    return x.grad


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_experts_in_codes_compute_what_transformers_computes_with_their_values(name, storage):
    plain = _built(name)
    coded = copy.deepcopy(plain)
    quantise_linear_layers(coded, storage=storage, block_size=32, double_quantisation=True)
    assert sum(isinstance(module, QuantisedStack) for module in coded.modules()) == 4
    wanted = tiny.expanded(coded, plain)
    assert torch.allclose(tiny.logits(coded, IDS), tiny.logits(wanted, IDS), rtol=0, atol=1e-6)
    a, b = _gradient(coded), _gradient(wanted)
    assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_an_expert_has_the_codes_that_it_has_alone(name):
    plain = _built(name)
    coded = copy.deepcopy(plain)
    how = {"storage": "nf4", "block_size": 32, "double_quantisation": True}
    quantise_linear_layers(coded, **how)
    for path, module in experts_of(coded).items():
        for projection in projections(module):
            weight = getattr(plain.get_submodule(path), projection)
            for expert in range(4):
                own = weight[expert].t() if module.is_transposed else weight[expert]
                linear = nn.Linear(*own.shape[::-1], bias=False)
                linear.weight = nn.Parameter(own)
                alone, there = QuantisedLinear.of(linear, **how).quantised, getattr(module, projection)
                for part in ("codes", "scales", "nested_scales", "offset"):
                    assert torch.equal(getattr(there.quantised(expert), part), getattr(alone, part))


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_experts_in_16_bits_stay_so_and_are_multiplied_in_fp32(name):
    half = _built(name).to(torch.bfloat16)
    wanted = copy.deepcopy(half).float()
    compute_in(half, torch.float32)
    for module in experts_of(half).values():
        assert {getattr(module, projection).dtype for projection in projections(module)} == {torch.bfloat16}
    assert half.state_dict().keys() == wanted.state_dict().keys()
    assert torch.allclose(tiny.logits(half, IDS), tiny.logits(wanted, IDS), rtol=0, atol=1e-6)
    a, b = _gradient(half), _gradient(wanted)
    assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_experts_that_are_trained_have_the_gradients_of_transformers_own(name):
    models = [_built(name).requires_grad_(True) for _ in range(2)]
    for module in experts_of(models[0]).values():
        own_experts(module)
    for model in models:
        model(**IDS).logits.square().sum().backward()
    for (key, ours), (_, theirs) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5), key


def test_what_an_expert_is_made_of_can_be_copied_pickled_and_given_back():
    model = _built("qwen3-moe")
    before, kinds = tiny.state(model), [type(module) for module in experts_of(model).values()]
    for module in experts_of(model).values():
        own_experts(module)
    logits = tiny.logits(model, IDS)
    assert torch.equal(tiny.logits(copy.deepcopy(model), IDS), logits)
    assert torch.equal(tiny.logits(pickle.loads(pickle.dumps(model)), IDS), logits)
    assert sum(isinstance(module, Experts) for module in model.modules()) == 2
    for module in experts_of(model).values():
        plain_experts(module)
    assert [type(module) for module in experts_of(model).values()] == kinds
    assert tiny.same_state(model, before)


def test_only_the_experts_with_tokens_are_expanded(monkeypatch):
    model = _built("qwen3-moe")
    quantise_linear_layers(model, storage="nf4", block_size=32, double_quantisation=True)
    asked = []
    real = QuantisedStack.frozen
    monkeypatch.setattr(QuantisedStack, "frozen", lambda self, expert: asked.append(expert) or real(self, expert))
    tiny.logits(model, {"input_ids": IDS["input_ids"][:1, :1]})
    assert len(asked) == 2 * 2 * 2  # of four experts two, in two layers, for two projections


def test_the_compute_type_changes_and_the_scales_stay():
    model = _built("mixtral")
    quantise_linear_layers(model, storage="nf4", block_size=32, double_quantisation=True)
    model.to(torch.bfloat16)
    stack = next(module for module in model.modules() if isinstance(module, QuantisedStack))
    assert (stack.dtype, stack.nested_scales.dtype, stack.offset.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    assert storage_of(model)["storage"] == "nf4"


def test_a_value_that_is_not_finite_is_refused_with_its_expert():
    model = _built("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"expert 2 of model\.layers\.1\.mlp\.experts\.down_proj holds a value"):
        quantise_linear_layers(model, storage="nf4", block_size=32, double_quantisation=True)


def test_experts_of_an_unknown_class_are_named():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 3, 4))

    model = nn.Sequential(nn.Linear(32, 2), Strange(), nn.Conv1d(2, 2, 2))
    assert without_codes(model) is None
    how = {"storage": "nf4", "block_size": 32, "double_quantisation": True}
    quantise_linear_layers(model, **how)
    said = "24 parameters of Strange are no linear layers of a known kind and are not in codes."
    assert without_codes(model) == said
    mixture = _built("mixtral")
    quantise_linear_layers(mixture, experts=False, **how)
    assert without_codes(mixture) == (
        "36,864 parameters of experts.gate_up_proj, experts.down_proj are kept dense, not in codes."
    )
    quantise_linear_layers(mixture, **how)
    assert without_codes(mixture) is None
