"""DoRA: magnitudes and directions, over any storage, alone and beside others."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
import veneer
from veneer.errors import AdapterFileError, ConfigError, TargetError
from veneer.planning.config import PlanOptions
from veneer.planning.plan import NO_MACHINE, plan
from veneer.updates.adapter_file import WEIGHTS_NAME
from veneer.updates.layers import Dora
from veneer.updates.record import row_adapters, updates_of


def _trained(model, inputs, name="default", **options):
    veneer.attach(model, veneer.LoRA(rank=4, alpha=6, dora=True, **options), name)
    tiny.train_steps(model, inputs)
    return updates_of(model, name)


def _direct(weight, update):
    """Equation 5, with everything formed."""
    grown = weight + update.scale * update.B @ update.A
    return update.m[:, None] * grown / grown.norm(dim=1, keepdim=True)


def test_every_row_of_the_weight_has_the_magnitude(tmp_path):
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    updates = _trained(model, inputs)
    expected = {path: _direct(model.get_submodule(path).weight, update) for path, update in updates.items()}
    veneer.merge(model)
    for path, weight in expected.items():
        merged = model.get_submodule(path).weight
        torch.testing.assert_close(merged, weight.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(merged.norm(dim=1), updates[path].m.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("storage", ["nf4", "int4", "int8", "bf16"])
def test_over_a_coded_base_it_is_that_over_what_the_codes_stand_for(storage, tiny_folder):
    coded, _ = veneer.load(tiny_folder, storage=storage)
    inputs = {key: value % 250 for key, value in tiny.batch("llama").items()}
    before = tiny.logits(coded, inputs)
    veneer.attach(coded, veneer.LoRA(rank=4, dora=True))
    assert torch.equal(tiny.logits(coded, inputs), before)
    tiny.train_steps(coded, inputs)
    update = updates_of(coded, "default")["model.layers.0.mlp.down_proj"]
    base = coded.get_submodule("model.layers.0.mlp.down_proj").base
    weight = veneer.frozen.weight.frozen_weight(base).dense().float()
    x = torch.randn(20, weight.shape[1])
    torch.testing.assert_close(
        coded.get_submodule("model.layers.0.mlp.down_proj")(x), x @ _direct(weight, update).t(), rtol=1e-4, atol=1e-5
    )
    after = tiny.logits(coded, inputs)
    assert not torch.allclose(after, before, atol=1e-3)
    veneer.merge(coded)
    if storage != "bf16":  # whose merged weights are rounded to 16 bits
        torch.testing.assert_close(tiny.logits(coded, inputs), after, rtol=0, atol=2e-6)
    veneer.unmerge(coded)
    assert torch.equal(tiny.logits(coded, inputs), after)


def test_the_norm_is_a_constant_to_the_gradient():
    layer = nn.Sequential(nn.Linear(5, 3))
    veneer.attach(layer, veneer.LoRA(rank=2, dora=True, targets=["0"]))
    update, x = layer[0].updates["default"], torch.randn(7, 5)
    nn.init.normal_(update.B)
    layer(x).square().sum().backward()
    A, B, m = (p.detach().clone().requires_grad_() for p in (update.A, update.B, update.m))
    grown = layer[0].weight + update.scale * B @ A
    y = x @ (m[:, None] * grown / grown.norm(dim=1, keepdim=True).detach()).t() + layer[0].bias
    y.square().sum().backward()
    for mine, its in ((update.A, A), (update.B, B), (update.m, m)):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-4)


def test_beside_other_adapters_each_adds_what_it_adds_alone():
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    base = tiny.state(model)
    _trained(model, inputs, "one", targets=["q_proj", "embed_tokens"])
    _trained(model, inputs, "two", targets=["q_proj", "embed_tokens"])
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]), "three")
    tiny.train_steps(model, inputs)
    veneer.activate(model, "one", "two", "three")
    path = "model.layers.1.self_attn.q_proj"
    weight = base[f"{path}.weight"]
    updates = model.get_submodule(path).updates
    expected = weight + sum(update.delta(weight.dtype, weight) for update in updates.values())
    together = tiny.logits(model, inputs)
    veneer.merge(model)
    torch.testing.assert_close(model.get_submodule(path).weight, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(tiny.logits(model, inputs), together, rtol=0, atol=2e-6)
    veneer.unmerge(model)
    for name in ("one", "two", "three"):
        veneer.remove(model, name)
    assert tiny.same_state(model, base)


def test_rows_of_a_batch_with_adapters_of_their_own():
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    _trained(model, inputs, "one", targets=["q_proj", "embed_tokens"])
    _trained(model, inputs, "two")
    alone = {}
    for name in ("one", "two"):
        veneer.activate(model, name)
        alone[name] = tiny.logits(model, inputs)
    with row_adapters(model, [("one",), ("two",), ("one", "two")], width=7):
        rows = tiny.logits(model, inputs)
    torch.testing.assert_close(rows[0], alone["one"][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(rows[1], alone["two"][1], rtol=0, atol=1e-6)


def test_generation_answers_as_the_merged_model_does(tiny_folder):
    model, tokenizer = veneer.load(tiny_folder)
    inputs = {key: value % 250 for key, value in tiny.batch("llama").items()}
    _trained(model, inputs)
    answers = veneer.generate(model, tokenizer, ["abc", "hello there"], max_new_tokens=8)
    veneer.merge(model)
    assert veneer.generate(model, tokenizer, ["abc", "hello there"], max_new_tokens=8) == answers


def test_norms_are_formed_anew_after_every_change():
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    updates = _trained(model, inputs, targets=["q_proj"])
    first = tiny.logits(model, inputs)
    with torch.no_grad():
        for update in updates.values():
            update.B.mul_(2)
    changed = tiny.logits(model, inputs)
    assert not torch.allclose(changed, first, atol=1e-4)
    other = copy.deepcopy(model)
    assert torch.equal(tiny.logits(other, inputs), changed)
    assert torch.equal(tiny.logits(pickle.loads(pickle.dumps(other)), inputs), changed)
    model.half().float()
    torch.testing.assert_close(tiny.logits(model, inputs), changed, rtol=0, atol=0.05)


def test_magnitudes_count_among_what_is_trained():
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"], dora=True))
    assert veneer.trainable(model).parameters == 2 * (2 * (32 + 32) + 32)
    assert all(isinstance(update, Dora) for update in updates_of(model, "default").values())


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_the_plan_counts_magnitudes_and_what_they_keep(storage, tiny_folder):
    asked = {"model": str(tiny_folder), "rank": 2, "targets": ["q_proj"], "batch_size": 4, "max_length": 32}
    plain, dora = (plan(PlanOptions(**asked, storage=storage, dora=dora), NO_MACHINE) for dora in (False, True))
    assert dora.parameters - plain.parameters == 2 * 32
    assert dora.training > plain.training


def test_a_zero_row_stays_zero():
    layer = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(layer[0].weight[1])
    x = torch.randn(2, 4)
    before = layer(x)
    veneer.attach(layer, veneer.LoRA(rank=2, dora=True, targets=["0"]))
    assert torch.equal(layer(x), before)
    layer(x).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.requires_grad)


def test_what_cannot_be_is_refused(tmp_path):
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    _trained(model, inputs, targets=["q_proj"])
    veneer.save(model, tmp_path / "a")
    with pytest.raises(AdapterFileError, match=r"lora_magnitude_vector\), which no plain LoRA can carry; merge it"):
        veneer.export(tmp_path / "a", tmp_path / "plain")
    file = tmp_path / "a/adapter_config.json"
    file.write_text(file.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(AdapterFileError, match=r"no place for .*lora_magnitude_vector"):
        veneer.load_adapter(tiny.build("llama"), tmp_path / "a")
    with pytest.raises(TargetError, match="is a parameter of experts, whose outputs have no magnitudes"):
        veneer.attach(tiny.build("mixtral"), veneer.LoRA(targets=["down_proj"], dora=True))
    with pytest.raises(ConfigError, match="use_dora is dora"):
        veneer.LoRA(use_dora=True)


def test_magnitudes_are_not_rounded_to_16_bits(tmp_path):
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.attach(model, veneer.LoRA(rank=4, dora=True))
    before = tiny.logits(model, inputs)
    veneer.save(model, tmp_path, dtype="bf16")
    types = {key.rsplit("lora_")[-1]: tensor.dtype for key, tensor in load_file(tmp_path / WEIGHTS_NAME).items()}
    assert types == {"A.weight": torch.bfloat16, "B.weight": torch.bfloat16, "magnitude_vector": torch.float32}
    fresh = tiny.build("llama")
    veneer.load_adapter(fresh, tmp_path)
    assert torch.equal(tiny.logits(fresh, inputs), before), "of B = 0"
