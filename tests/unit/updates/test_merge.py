"""Merging: right to the rounding, reversible to the last bit, and a plain module afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiny
import veneer
from veneer.errors import AdapterFileError, TargetError
from veneer.models.load import quantise_linear_layers

pytestmark = pytest.mark.unit


def _trained(name="llama", dtype=torch.float32, **options):
    model, inputs = tiny.build(name).to(dtype), tiny.batch(name)
    veneer.attach(model, veneer.LoRA(rank=4, **options))
    tiny.train_steps(model, inputs)
    return model, inputs


def test_a_merged_linear_layer_is_a_plain_one():
    model, inputs = _trained()
    adapted = tiny.logits(model, inputs)
    veneer.merge(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(tiny.logits(model, inputs), adapted, rtol=0, atol=1e-5)


def test_unmerge_gives_the_original_bytes():
    model, inputs = _trained()
    before, adapted = tiny.state(model), tiny.logits(model, inputs)
    veneer.merge(model)
    veneer.unmerge(model)
    assert tiny.same_state(model, before)
    assert torch.equal(tiny.logits(model, inputs), adapted)
    tiny.train_steps(model, inputs)
    assert not tiny.same_state(model, before), "and it trains on"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_is_summed_in_fp32_and_rounded_once(dtype, name):
    model, _ = _trained(name, dtype)
    path = "model.layers.0.self_attn.q_proj" if name == "llama" else "transformer.h.0.attn.c_attn"
    wrapper = model.get_submodule(path)
    update = wrapper.updates["default"]
    delta = update.scale * (update.B.detach() @ update.A.detach())
    exact = wrapper.base.weight.detach().float() + (delta if name == "llama" else delta.t())
    veneer.merge(model)
    assert torch.equal(model.get_submodule(path).weight, exact.to(dtype))


def test_several_active_adapters_merge_together():
    model, inputs = _trained()
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]), "b")
    tiny.train_steps(model, inputs)
    veneer.activate(model, "default", "b")
    adapted = tiny.logits(model, inputs)
    veneer.merge(model, reversible=False)
    torch.testing.assert_close(tiny.logits(model, inputs), adapted, rtol=0, atol=1e-5)
    with pytest.raises(TargetError, match="reversible=False"):
        veneer.unmerge(model)
    veneer.attach(model, veneer.LoRA())  # a merged base is a base like any other


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"]])
def test_merging_a_quantised_base_makes_a_plain_model(name, targets, tmp_path):
    model, inputs = tiny.build(name), tiny.batch(name)
    if name == "gpt2" and targets != "all-linear":
        targets = ["c_proj"]
    keys = model.state_dict().keys()
    quantise_linear_layers(model)
    veneer.attach(model, veneer.LoRA(rank=4, targets=targets))
    tiny.train_steps(model, inputs)
    adapted = tiny.logits(model, inputs)
    veneer.merge(model)
    assert model.state_dict().keys() == keys, "layers without an update are plain again, too"
    torch.testing.assert_close(tiny.logits(model, inputs), adapted, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(again, inputs), adapted, rtol=0, atol=1e-5)
    veneer.unmerge(model)
    assert torch.equal(tiny.logits(model, inputs), adapted)


def test_a_quantised_module_cannot_be_trained_whole():
    model = tiny.build("llama")
    quantise_linear_layers(model)
    with pytest.raises(TargetError, match=r"train_also names model.layers.0.mlp, which is kept in codes and cannot"):
        veneer.attach(model, veneer.LoRA(targets=["q_proj"], train_also=["0.mlp"]))


def test_a_tied_head_is_untied_when_only_one_of_the_two_is_adapted(tmp_path):
    model, inputs = tiny.build("llama-tied"), tiny.batch("llama")
    veneer.attach(model, veneer.LoRA(rank=4, targets=["lm_head"]))
    tiny.train_steps(model, inputs)
    adapted = tiny.logits(model, inputs)
    frozen = model.model.embed_tokens.weight
    veneer.merge(model, reversible=False)
    assert model.model.embed_tokens.weight is frozen
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(again, inputs), adapted, rtol=0, atol=1e-5)


def test_unmerge_keeps_the_mode_and_refuses_a_model_that_was_converted():
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.attach(model, veneer.LoRA(rank=4, dropout=0.5))
    tiny.train_steps(model, inputs)
    model.train()
    veneer.merge(model)
    model.eval()
    veneer.unmerge(model)
    assert torch.equal(tiny.logits(model, inputs), tiny.logits(model, inputs)), "no dropout"
    veneer.merge(model)
    model.to(torch.bfloat16)
    with pytest.raises(
        TargetError, match=r"was merged as float32 on cpu and is bfloat16 on cpu now; put the model back"
    ):
        veneer.unmerge(model)


def test_refusals():
    model = tiny.build("llama")
    with pytest.raises(TargetError, match="nothing to merge"):
        veneer.merge(model)
    with pytest.raises(TargetError, match="Nothing is merged"):
        veneer.unmerge(model)
    veneer.attach(model, veneer.LoRA())
    veneer.merge(model)
    for action in (
        lambda: veneer.merge(model),
        lambda: veneer.attach(model, veneer.LoRA(), "b"),
        lambda: veneer.remove(model),
        lambda: veneer.activate(model),
        lambda: veneer.save(model, "somewhere"),
    ):
        with pytest.raises(TargetError, match=r"merged into its weights; unmerge\(model\) before"):
            action()


@pytest.mark.parametrize(("dtype", "value"), [("float32", "nan"), ("float32", "inf"), ("float16", "1e5")])
def test_values_that_are_not_finite_are_not_merged(dtype, value):
    model, _ = _trained(dtype=getattr(torch, dtype))
    update = model.model.layers[1].mlp.up_proj.updates["default"]
    with torch.no_grad():
        update.B.fill_(float(value))
        update.A.fill_(1.0)
    before = tiny.state(model)
    match = rf"model.layers.1.mlp.up_proj cannot be merged: .*not finite in {dtype}"
    for reversible in (True, False):
        with pytest.raises(AdapterFileError, match=match):
            veneer.merge(model, reversible=reversible)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(tiny.state(model).values(), before.values(), strict=True)
    )


@pytest.mark.parametrize("options", [{"targets": ["q_proj"], "new_tokens": [5]}, {"train_also": ["model.norm"]}])
def test_nor_are_rows_and_whole_modules(options):
    model, _ = _trained(**options)
    with torch.no_grad():
        if "new_tokens" in options:
            model.model.embed_tokens.updates["default"].rows[0, 0] = float("inf")
        else:
            model.model.norm.updates["default"].weight[0] = float("nan")
    with pytest.raises(AdapterFileError, match=r"model.(norm|embed_tokens) cannot be merged"):
        veneer.merge(model)


def test_large_but_finite_values_are_merged():
    model, _ = _trained()
    update = model.model.layers[1].mlp.up_proj.updates["default"]
    with torch.no_grad():
        update.B.zero_().view(-1)[0] = 1e30
        update.A.zero_().view(-1)[-1] = 1e30
    veneer.merge(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_after_a_merge_is_not_dropped_in_silence(name):
    model, inputs = _trained(name)
    adapted = tiny.logits(model, inputs)
    veneer.merge(model)
    model.double().float()  # and another type and back is no change
    veneer.unmerge(model)
    assert torch.equal(tiny.logits(model, inputs), adapted)
    veneer.merge(model)
    model.requires_grad_(True)
    tiny.train_steps(model, inputs, steps=1)
    trained = tiny.logits(model, inputs)
    with pytest.raises(TargetError, match=r" more changed after the merge, by training.*drop_changes=True"):
        veneer.unmerge(model)
    assert torch.equal(tiny.logits(model, inputs), trained)
    veneer.unmerge(model, drop_changes=True)
    assert "updates.default" in " ".join(name for name, _ in model.named_parameters())


def test_a_copy_of_a_merged_model_is_unmerged():
    model, inputs = _trained()
    adapted = tiny.logits(model, inputs)
    veneer.merge(model)
    other = copy.deepcopy(model)
    veneer.unmerge(other)
    assert torch.equal(tiny.logits(other, inputs), adapted)
