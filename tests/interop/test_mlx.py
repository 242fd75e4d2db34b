"""An adapter in mlx-lm's form, and a merged folder, loaded by mlx-lm itself: the logits are those of the run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
import transformers as tf

import tiny
import veneer
from peers import ask, python_with
from tokens import tokenizer
from veneer.cli import main
from veneer.commands.export import export_to
from veneer.commands.merge import merge_to
from veneer.reporting.loading import LoadedBy, ways_to_load
from veneer.runs.opened import open_named
from veneer.updates.mlx_adapter import MODELS
from veneer.updates.peft_config import read_fields

pytestmark = pytest.mark.interop

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": 0,
}  # fmt: skip
MORE = {
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "qwen3": {"head_dim": 16},
}
CONFIGS = {
    "lora": veneer.LoRA(rank=4, alpha=6),
    "rslora and patterns": veneer.LoRA(
        rank=4, rank_pattern={"0.*q_proj": 2, "v_proj": 7}, alpha_pattern={"q_proj": 3}, rslora=True
    ),
    "adalora": veneer.AdaLoRA(initial_rank=4, target_rank=2, total_steps=6, tinit=1, tfinal=1),
}
IDS = [(7 * i + 3) % 250 for i in range(24)]


def _base(place, kind):
    words = tokenizer()
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(kind, vocab_size=len(words), **{**SIZES, **MORE.get(kind, {})})
    config.eos_token_id = words.eos_token_id
    model = tf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(place)
    words.save_pretrained(place)
    file = place / "config.json"  # as folders of the hub have it: mlx-lm takes the base of the rotation from there
    fields = json.loads(file.read_text())
    rope = fields["rope_parameters"]
    fields["rope_theta"] = rope.get("full_attention", rope)["rope_theta"]
    file.write_text(json.dumps(fields))
    return place


def _adapted(base, folder, config):
    model, _ = veneer.load(base)
    torch.manual_seed(0)
    veneer.attach(model, config)
    ids = torch.tensor([IDS])
    tiny.train_steps(model, {"input_ids": ids, "labels": ids}, steps=6, lr=0.05)
    veneer.save(model, folder)
    with torch.no_grad(), veneer.disabled(model):
        before = model(ids).logits[0]
    with torch.no_grad():
        return model(ids).logits[0], before


@pytest.mark.parametrize(("kind", "config"), [*((kind, "lora") for kind in MODELS), ("llama", "adalora"),
                                              ("llama", "rslora and patterns")])  # fmt: skip
def test_mlx_lm_gives_the_adapters_own_logits(kind, config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = _base(tmp_path / "base", kind)
    own, before = _adapted(base, tmp_path / "adapter", CONFIGS[config])
    assert (own - before).abs().max() > 0.05, "the adapter does something"
    export_to(tmp_path / "adapter", tmp_path / "mlx", format="mlx")
    theirs = torch.tensor(ask("mlx_lm", "mlx_logits.py", base, tmp_path / "mlx", json.dumps(IDS)))
    torch.testing.assert_close(theirs, own, rtol=0, atol=2e-5)


def test_mlx_lm_loads_a_merged_folder(tmp_path, monkeypatch):
    base = _base(tmp_path / "base", "llama")
    own, _ = _adapted(base, tmp_path / "adapter", CONFIGS["lora"])
    merge_to(tmp_path / "adapter", tmp_path / "merged")
    theirs = torch.tensor(ask("mlx_lm", "mlx_logits.py", tmp_path / "merged", "none", json.dumps(IDS)))
    torch.testing.assert_close(theirs, own, rtol=0, atol=2e-5)


def test_the_commands_of_the_report_answer_as_the_adapter_does(tmp_path, monkeypatch):
    """The export, and mlx-lm's own command in its own environment; its greedy text is that of the same tokens here."""
    python = python_with("mlx_lm")
    if python is None:
        pytest.skip("mlx_lm is not installed; make build/peers/ready installs it")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, source = _base(tmp_path / "base", "llama"), tmp_path / "adapter"
    _adapted(base, source, CONFIGS["lora"])
    (recipe,) = (way for way in ways_to_load(LoadedBy(
        read_fields(source), {}, str(base), str(source), str(source), str(tmp_path / "merged"), str(tmp_path / "plain"),
        "first", [], {"storage": "fp32", "block_size": 64},
    )) if way.title == "MLX")  # fmt: skip
    export, generate = map(shlex.split, recipe.parts[0][1].splitlines())
    monkeypatch.setattr(sys, "argv", export)
    main()
    assert generate[0] == "mlx_lm.generate"
    command = [python, "-m", "mlx_lm", "generate", *generate[1:], "--max-tokens", "12"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    opened = open_named(source)
    words, model = opened.renderer.tokenizer, opened.model
    ids = words.apply_chat_template([{"role": "user", "content": "a prompt"}], add_generation_prompt=True)["input_ids"]
    prompt = len(ids)
    while len(ids) < prompt + 12 and (not ids[prompt:] or ids[-1] != words.eos_token_id):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = ran.stdout.split("==========\n")[1].strip()
    assert said == words.decode([token for token in ids[prompt:] if token != words.eos_token_id]).strip()
