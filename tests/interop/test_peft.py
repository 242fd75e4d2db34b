"""Adapters cross to the installed peft and back, with the same logits."""

from __future__ import annotations

import peft
import pytest
import torch

import tiny
import veneer
from veneer.errors import TargetError

pytestmark = pytest.mark.interop

_LINEAR = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "gptneox": ["query_key_value"], "t5": ["q"]}


def _assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_peft_loads_ours(name, tmp_path):
    model, inputs = tiny.build(name), tiny.batch(name)
    veneer.attach(model, veneer.LoRA(rank=4, alpha=6))
    tiny.train_steps(model, inputs)
    veneer.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny.build(name), tmp_path / "a").eval()
    _assert_same(tiny.logits(theirs, inputs), tiny.logits(model, inputs))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"targets": ["q_proj", "v_proj"], "rslora": True, "init": "gaussian"}),
        ("llama", {"targets": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"0.*q_proj": 3}}),
        ("llama", {"targets": r".*layers\.1\..*_proj", "exclude": ["o_proj"]}),
        ("llama", {"targets": ["embed_tokens", "q_proj"]}),
        ("llama", {"targets": ["lm_head"]}),
        ("llama", {"targets": ["q_proj"], "train_also": ["lm_head"]}),
        ("llama", {"targets": ["q_proj"], "train_also": ["norm"]}),  # whose ending PEFT finds in input_layernorm
        ("llama", {"targets": ["q_proj"], "new_tokens": [5, 9]}),
        ("llama-tied", {"targets": ["q_proj"], "new_tokens": [5, 9]}),
        *((name, {"targets": ["q_proj"], "new_tokens": [5, 9]}) for name in ("bart", "m2m100")),
        ("t5", {"targets": ["q", "lm_head"], "train_also": ["encoder.embed_tokens"]}),
        ("bart", {"targets": ["q_proj", "embed_tokens"]}),
        ("gpt2", {"targets": ["wte", "c_attn"]}),
        ("bert", {"targets": ["query"], "layers": [1]}),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peft_loads_every_kind(name, options, dtype, tmp_path):
    model, inputs = tiny.build(name), tiny.batch(name)
    veneer.attach(model, veneer.LoRA(rank=4, alpha=6, **options))
    tiny.train_steps(model, inputs)
    veneer.save(model, tmp_path / "a", dtype=dtype)
    ours = tiny.build(name)
    veneer.load_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny.build(name), tmp_path / "a").eval()
    _assert_same(tiny.logits(theirs, inputs), tiny.logits(ours, inputs))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"target_modules": targets}) for name, targets in _LINEAR.items()),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "lora_dropout": 0.1}),
        (
            "llama",
            {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        ),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": r".*layers\.0.*q_proj"}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),  # every one whose name ends so
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}),
        ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}}),
        *(("bart", {"target_modules": ["q_proj"], "trainable_token_indices": form}) for form in ([5], {"shared": [5]})),
        ("t5", {"target_modules": ["q"], "trainable_token_indices": {"shared": [5]}}),
        ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
        ("bert", {"target_modules": ["query", "value"]}),  # the head as it was
    ],
)
def test_we_load_pefts(name, options, tmp_path):
    inputs = tiny.batch(name)
    theirs = peft.get_peft_model(tiny.build(name), peft.LoraConfig(r=4, lora_alpha=6, **options))
    tiny.train_steps(theirs, inputs)
    theirs.save_pretrained(tmp_path / "a")
    model = tiny.build(name)
    veneer.load_adapter(model, tmp_path / "a")
    _assert_same(tiny.logits(model, inputs), tiny.logits(theirs, inputs))


def test_our_scaled_embedding_matches_peft(tmp_path):
    model, inputs = tiny.build("gemma3"), tiny.batch("gemma3")
    veneer.attach(model, veneer.LoRA(rank=4, targets=["embed_tokens"]))
    tiny.train_steps(model, inputs)
    veneer.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny.build("gemma3"), tmp_path / "a").eval()
    _assert_same(tiny.logits(theirs, inputs), tiny.logits(model, inputs))


@pytest.mark.parametrize("kind", ["LoRA", "prompts", "add_adapter"])
def test_a_model_with_adapters_of_peft_is_refused(kind):
    base = tiny.build("llama")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    if kind == "add_adapter":
        base.add_adapter(lora)
        model = base
    else:
        prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = peft.get_peft_model(base, lora if kind == "LoRA" else prompts)
    state = tiny.state(model)
    where = "" if kind == "prompts" else r" \(on .*layers.0.self_attn.q_proj, .*layers.0.self_attn.v_proj and 2 more\)"
    message = (
        rf"has adapters of peft already{where}, under which no other.*model.unload\(\), or merge them with merge_and_"
    )
    with pytest.raises(TargetError, match=message):
        veneer.attach(model, veneer.LoRA())
    assert tiny.same_state(model, state)
    if kind == "LoRA":
        veneer.attach(model.unload(), veneer.LoRA(rank=2))
