"""An adapter as a plain LoRA: what vLLM and llama.cpp read, and peft loads with the same logits."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import tiny
import veneer
from veneer.errors import AdapterFileError

pytestmark = pytest.mark.interop

_KINDS = {
    "adalora": veneer.AdaLoRA(initial_rank=4, target_rank=2, total_steps=6, tinit=1, tfinal=1),
    "lora": veneer.LoRA(rank=4, alpha=6),
    "patterns": veneer.LoRA(
        rank=4, rank_pattern={"0.*q_proj": 2, "v_proj": 7}, alpha_pattern={"q_proj": 3}, rslora=True
    ),
    "embedding": veneer.LoRA(rank=3, targets=["embed_tokens", "q_proj"]),
}


def _trained(kind, name, tmp_path, **more):
    model = tiny.build(name)
    torch.manual_seed(0)
    veneer.attach(model, _KINDS[kind].model_copy(update=more))
    tiny.train_steps(model, tiny.batch(name), steps=6)
    veneer.save(model, tmp_path / "a")
    return model


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "llama") for kind in _KINDS), ("adalora", "gpt2"), ("lora", "gpt2"), ("embedding", "llama-tied")],
)
def test_peft_loads_the_plain_lora(kind, name, padded, tmp_path):
    model, inputs = _trained(kind, name, tmp_path), tiny.batch(name)
    veneer.export(tmp_path / "a", tmp_path / "plain", padded=padded)
    theirs = peft.PeftModel.from_pretrained(tiny.build(name), tmp_path / "plain").eval()
    torch.testing.assert_close(tiny.logits(theirs, inputs), tiny.logits(model, inputs), rtol=0, atol=2e-6)
    again = tiny.build(name)
    veneer.load_adapter(again, tmp_path / "plain")
    torch.testing.assert_close(tiny.logits(again, inputs), tiny.logits(model, inputs), rtol=0, atol=2e-6)


def test_padded_it_has_what_every_loader_knows_and_nothing_else(tmp_path):
    model = tiny.build("llama")
    veneer.attach(model, _KINDS["adalora"])
    # Every second matrix has lost all that it had.
    veneer.allocator(model).fix(torch.tensor([[False] * 4, [True, True, False, True]] * 7))
    veneer.save(model, tmp_path / "a")
    veneer.export(tmp_path / "a", tmp_path / "plain")
    fields = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 3, 3)
    assert (fields["rank_pattern"], fields["alpha_pattern"], fields["use_rslora"]) == ({}, {}, False)
    tensors = load_file(tmp_path / "plain/adapter_model.safetensors")
    assert len(tensors) == 2 * 14
    for key, tensor in tensors.items():
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))
        assert tensor.shape["lora_B" in key] == 3


@pytest.mark.parametrize("more", [{"train_also": ["lm_head"]}, {"new_tokens": [5]}])
def test_what_no_plain_lora_can_carry_is_refused(more, tmp_path):
    _trained("lora", "llama", tmp_path, **more)
    with pytest.raises(AdapterFileError, match=r"trains more than low-rank updates .*; merge it into its base instead"):
        veneer.export(tmp_path / "a", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_folder_that_is_taken_is_refused(tmp_path):
    _trained("lora", "llama", tmp_path)
    with pytest.raises(AdapterFileError, match="exists and is not an empty folder"):
        veneer.export(tmp_path / "a", tmp_path / "a")
    with pytest.raises(AdapterFileError, match=r"holds no adapter_config\.json"):
        veneer.export(tmp_path, tmp_path / "plain")
