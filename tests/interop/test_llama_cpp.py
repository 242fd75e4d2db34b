"""GGUF files asked of llama.cpp itself, by llama-cpp-python: its logits, its greedy text and its tokens are ours."""

from __future__ import annotations

import json
import random

import pytest
import torch

import tiny
import veneer
from gguf_kinds import WRITABLE
from peers import ask
from tokens import tokenizer
from veneer.commands.export import export_to
from veneer.commands.merge import merge_to

pytestmark = pytest.mark.interop

IDS = [(7 * i + 3) % 250 for i in range(64)]
# llama.cpp's GELU is a table in fp16, which Gemma's and GPT-2's layers go through.
GELU = {"gemma2": 5e-3, "gemma3_text": 3e-2}
# Its windows are of Gemma alone; without a layer that sees all positions it does not run.
LEFT_OUT = ("phi3, a part rotated, a window", "gemma3, a cap", "starcoder2")


def _asked(**job):
    return ask("llama_cpp", "llama_cpp_logits.py", json.dumps({key: str(v) if key in ("model", "adapter") else v
                                                               for key, v in job.items()}))  # fmt: skip


@pytest.mark.parametrize("name", [name for name in WRITABLE if name not in LEFT_OUT])
def test_the_logits_of_a_merged_file(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = WRITABLE[name]().eval()
    if model.config.model_type == "qwen2":
        model.resize_token_embeddings(264)  # its tokenizer has <|endoftext|>, whatever the others are
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.15).add_(float(parameter.dim() == 1 and "norm" in key))
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    tokenizer(merges=(("h", "e"), ("l", "l"))).save_pretrained(tmp_path / "base")
    merge_to(tmp_path / "base", tmp_path / "m.gguf", format="gguf")
    theirs = torch.tensor(_asked(model=tmp_path / "m.gguf", ids=IDS)["logits"])
    with torch.no_grad():
        own = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(theirs, own, rtol=0, atol=GELU.get(model.config.model_type, 1e-3))


KINDS = {
    "lora": (veneer.LoRA(rank=4, alpha=6), "fp32"),
    "rslora": (veneer.LoRA(rank=4, alpha=8, rslora=True), "fp32"),
    "patterns": (veneer.LoRA(rank=4, rank_pattern={"0.*q_proj": 2, "v_proj": 7}, alpha_pattern={"q_proj": 3}), "fp32"),
    "adalora": (veneer.AdaLoRA(initial_rank=4, target_rank=2, total_steps=6, tinit=1, tfinal=1), "fp32"),
    "embedding": (veneer.LoRA(rank=3, targets=["embed_tokens", "q_proj"]), "fp32"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_over_its_base_is_the_merged_file_and_ours(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, storage = KINDS[kind]
    tiny.llama_folder(tmp_path / "base", tokenizer(merges=(("h", "e"), ("l", "l"))))
    model, _ = veneer.load(tmp_path / "base", storage)
    torch.manual_seed(0)
    veneer.attach(model, config)
    ids = torch.tensor([IDS])
    tiny.train_steps(model, {"input_ids": ids, "labels": ids}, steps=6, lr=0.05)
    veneer.save(model, tmp_path / "adapter")
    exported = export_to(tmp_path / "adapter", tmp_path / "both", format="gguf")
    merge_to(tmp_path / "adapter", tmp_path / "merged.gguf", format="gguf")
    over = _asked(model=exported.base, adapter=exported.out, ids=IDS, greedy=64)
    merged = _asked(model=tmp_path / "merged.gguf", ids=IDS, greedy=64)
    own = tiny.logits(model, {"input_ids": ids})[0]
    torch.testing.assert_close(torch.tensor(over["logits"]), own, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.tensor(merged["logits"]), own, rtol=0, atol=1e-3)
    said, sequence = [], list(IDS)
    while len(said) < 64:
        said.append(int(tiny.logits(model, {"input_ids": torch.tensor([sequence])})[0, -1].argmax()))
        sequence.append(said[-1])
    length = min(64, len(merged["greedy"]))
    assert over["greedy"][:length] == merged["greedy"] == said[:length]


@pytest.mark.parametrize("begin", [True, False])
def test_2_000_lines_become_the_same_tokens_and_the_begin_token_is_once(begin, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = tokenizer(begin=begin, merges=(("h", "e"), ("l", "l"), ("Ġ", "t")))
    tiny.llama_folder(tmp_path / "base", words)
    merge_to(tmp_path / "base", tmp_path / "m.gguf", format="gguf")
    draw = random.Random(0)
    parts = [
        "hello",
        " the",
        "they'll",
        "\n",
        "  ",
        "é",
        "日本",
        "🦙",
        "12 345",
        "<|user|>",
        "<|end|>",
        "<|assistant|>",
        ".",
    ]
    texts = ["".join(draw.choices(parts, k=draw.randint(1, 12))) for _ in range(2000)]
    theirs = _asked(model=tmp_path / "m.gguf", texts=texts)["tokens"]
    assert theirs == [words(text).input_ids for text in texts]
    assert {ids.count(words.bos_token_id) for ids in theirs} == {int(begin)}
