"""GGUF files asked of llama.cpp itself, by llama-cpp-python: its logits, its greedy text and its tokens are ours."""

from __future__ import annotations

import io
import json
import random

import pytest
import torch
from rich.console import Console

import tiny
import veneer
from gguf_kinds import WRITABLE
from peers import ask
from tokens import tokenizer
from veneer.commands.export import export_to
from veneer.commands.merge import merge_to
from veneer.runs.opened import open_named

pytestmark = pytest.mark.interop

IDS = [(7 * i + 3) % 250 for i in range(64)]
# Through seven layers last digits choose other entries of llama.cpp's GELU: ours with its table, in fp32 and in fp64,
# differ by 3.3e-3.
SEVEN_LAYERS = {"gemma3_text": 5e-3}
# Its windows are of Gemma alone; without a layer that sees all positions it does not run.
LEFT_OUT = ("phi3, a part rotated, a window", "gemma3, a cap", "starcoder2")


class _TableGelu(torch.nn.Module):
    """llama.cpp's GELU: a table of its values in fp16, by the number rounded to fp16 (ggml_vec_gelu_f32)."""

    def forward(self, x):
        y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0, torch.where(x >= 10, x, y))


def _as_llama_cpp_computes(model):
    """The model with llama.cpp's GELU where it has one, so that all else can be compared closely."""
    for name, module in [*model.named_modules()]:
        if "gelu" in type(module).__name__.lower():
            model.set_submodule(name, _TableGelu())
    return model


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
        own = _as_llama_cpp_computes(model)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(theirs, own, rtol=0, atol=SEVEN_LAYERS.get(model.config.model_type, 1e-3))


KINDS = {
    "lora": veneer.LoRA(rank=4, alpha=6),
    "rslora": veneer.LoRA(rank=4, alpha=8, rslora=True),
    "patterns": veneer.LoRA(rank=4, rank_pattern={"0.*q_proj": 2, "v_proj": 7}, alpha_pattern={"q_proj": 3}),
    "adalora": veneer.AdaLoRA(initial_rank=4, target_rank=2, total_steps=6, tinit=1, tfinal=1),
    "embedding": veneer.LoRA(rank=3, targets=["embed_tokens", "q_proj"]),
}


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny.llama_folder(tmp_path / "base", tokenizer(merges=(("h", "e"), ("l", "l"))))
    return tmp_path / "base"


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_over_its_base_is_the_merged_file_and_ours(kind, base, tmp_path):
    model, _ = veneer.load(base)
    torch.manual_seed(0)
    veneer.attach(model, KINDS[kind])
    ids = torch.tensor([IDS])
    tiny.train_steps(model, {"input_ids": ids, "labels": ids}, steps=6, lr=0.05)
    veneer.save(model, tmp_path / "adapter")
    _compare(tmp_path / "adapter", model, tmp_path)


@pytest.mark.parametrize("options", [{}, {"method": "adalora", "initial_rank": 4, "target_rank": 2}])
def test_of_a_run_over_nf4_it_goes_over_what_the_codes_stand_for(options, base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hello", "completion": " there"}\n' * 8)
    veneer.train(
        str(base), data=str(rows), output=str(tmp_path / "run"), steps=8, held_out=0, learning_rate=1e-1,
        storage="nf4", console=Console(file=io.StringIO()), **options,
    )  # fmt: skip
    model = open_named(tmp_path / "run").model
    with torch.no_grad(), veneer.disabled(model):
        before = model(torch.tensor([IDS])).logits[0]
    assert (before - tiny.logits(model, {"input_ids": torch.tensor([IDS])})[0]).abs().max() > 0.05
    _compare(tmp_path / "run", model, tmp_path)


def _compare(source, model, tmp_path):
    """llama.cpp with the exported adapter over its base, and with the merged file, answers as ``model`` does."""
    exported = export_to(source, tmp_path / "both", format="gguf")
    merge_to(source, tmp_path / "merged.gguf", format="gguf")
    ids = torch.tensor([IDS])
    over = _asked(model=exported.base, adapter=exported.out, ids=IDS, greedy=64)
    merged = _asked(model=tmp_path / "merged.gguf", ids=IDS, greedy=64)
    own = tiny.logits(model, {"input_ids": ids})[0]
    torch.testing.assert_close(torch.tensor(over["logits"]), own, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.tensor(merged["logits"]), own, rtol=0, atol=1e-3)
    said, sequence = [], list(IDS)
    while len(said) < 64:
        said.append(int(tiny.logits(model, {"input_ids": torch.tensor([sequence])})[0, -1].argmax()))
        sequence.append(said[-1])
    assert over["greedy"] == merged["greedy"] == said


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
