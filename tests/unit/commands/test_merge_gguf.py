"""veneer merge --format gguf: the merged model as one file, read again by veneer.load; what rounding costs; Ollama's
folder."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from rich.console import Console

import tiny
import veneer
from tokens import tokenizer
from veneer.cli import cli
from veneer.commands.export import export_to
from veneer.commands.merge import merge_to
from veneer.data.go_template import rendered_by_go
from veneer.errors import ConfigError, DataError, ModelError
from veneer.models.checkpoint import Checkpoint
from veneer.models.gguf_header import GgufHeader
from veneer.runs.opened import open_named, open_run

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose rows are blocks of 32, but for one matrix."""
    place = tmp_path_factory.mktemp("base")
    tiny.llama_folder(place, tokenizer(begin=True, merges=(("h", "e"), ("l", "l"))))
    model = tf.AutoModelForCausalLM.from_pretrained(place)
    for parameter in model.parameters():  # large enough that rounding shows
        parameter.data *= 8
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A function from options to the folder of a short run on conversations."""
    place = tmp_path_factory.mktemp("runs")
    rows = place / "rows.jsonl"
    talk = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "yes"}]}
        for word in ("bat", "big", "cop", "dun", "far", "gig", "hop", "jet")
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in talk))

    def run(name, **options):
        if not (place / name).is_dir():
            veneer.train(
                str(folder), data=str(rows), output=str(place / name), steps=4, held_out=2, learning_rate=1e-1,
                console=Console(file=io.StringIO()), **options,
            )  # fmt: skip
        return place / name

    return run


RUNS = {
    "lora": {},
    "nf4": {"storage": "nf4"},
    "rows and head": {"new_tokens": [261], "train_also": ["lm_head"]},
    "adalora": {"method": "adalora", "initial_rank": 4, "target_rank": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_file_is_the_merged_folder_to_the_bit(name, trained, tmp_path):
    run = trained(name, **RUNS[name])
    merge_to(run, tmp_path / "merged")
    merge_to(run, tmp_path / "merged.gguf", format="gguf")
    wanted, words = veneer.load(tmp_path / "merged")
    read, its_words = veneer.load(tmp_path / "merged.gguf")
    own = wanted.state_dict()
    assert [key for key, tensor in read.state_dict().items() if not torch.equal(tensor, own[key])] == []
    assert words.get_vocab().items() <= its_words.get_vocab().items()  # transformers adds one of GPT-2's
    assert its_words.chat_template == words.chat_template
    text = "hello <|user|>there<|end|>\n 123"
    assert its_words(text).input_ids == words(text).input_ids


def test_what_rounding_costs_is_that_of_the_file_and_it_is_printed(trained, tmp_path):
    run = trained("lora")
    ran = CliRunner().invoke(
        cli, ["merge", str(run), str(tmp_path / "m.gguf"), "--format", "gguf", "--storage", "q4_0"]
    )
    assert ran.exit_code == 0, ran.output
    moved = merge_to(run, tmp_path / "again.gguf", format="gguf", storage="q4_0").moved
    assert moved.sentence("q4_0") in ran.output
    assert moved.kl > 1e-3
    assert "Note: blk.0.ffn_down.weight, blk.1.ffn_down.weight: rows are no multiple of 32 values" in ran.output
    assert f"written to {tmp_path / 'm.gguf'}. Next: llama-cli -m {tmp_path / 'm.gguf'}" in ran.output
    opened = open_named(run)
    rounded = veneer.load(tmp_path / "m.gguf")[0]
    prepared = open_run(run)
    total, count = 0.0, 0
    for example in prepared.held_out:
        tokens = prepared.renderer.one(example)
        ids, learned = torch.tensor([tokens.ids]), torch.tensor(tokens.labels[1:]) != -100
        with torch.no_grad():
            before, after = (m(ids).logits[0, :-1][learned].log_softmax(-1) for m in (opened.model, rounded))
        total += float((before.exp() * (before - after)).sum())
        count += int(learned.sum())
    assert moved.tokens == count
    assert moved.kl == pytest.approx(total / count, rel=1e-3)


def test_a_model_without_an_adapter_and_one_whose_own_weights_were_trained_are_written(folder, trained, tmp_path):
    merge_to(folder, tmp_path / "plain.gguf", format="gguf")
    own = veneer.load(folder)[0].state_dict()
    read = veneer.load(tmp_path / "plain.gguf")[0].state_dict()
    assert all(torch.equal(read[key], own[key]) for key in own)
    run = trained("full", method="full")
    merge_to(run, tmp_path / "full.gguf", format="gguf")
    own = veneer.load(run / "model")[0].state_dict()
    read = veneer.load(tmp_path / "full.gguf")[0].state_dict()
    assert all(torch.equal(read[key], own[key]) for key in own)


def test_a_base_from_a_file_gives_on_what_its_file_says(trained, folder, tmp_path):
    """Also with a template of the run's own."""
    merge_to(folder, tmp_path / "base.gguf", format="gguf")
    data = (tmp_path / "base.gguf").read_bytes()
    (tmp_path / "base.gguf").write_bytes(data.replace(b"gpt-2", b"mpt\0\0").replace(b"mpt\0\0", b"phi-2"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 4)
    veneer.train(
        str(tmp_path / "base.gguf"), data=str(rows), output=str(tmp_path / "run"), steps=2, held_out=0,
        template="chatml", console=Console(file=io.StringIO()),
    )  # fmt: skip
    merge_to(tmp_path / "run", tmp_path / "m.gguf", format="gguf")
    header, base = Checkpoint(tmp_path / "m.gguf").gguf, Checkpoint(tmp_path / "base.gguf").gguf
    assert header.metadata["tokenizer.ggml.pre"] == "phi-2"
    assert "<|im_start|>" in header.metadata["tokenizer.chat_template"]
    for key in ("tokens", "token_type", "merges", "eos_token_id", "add_bos_token"):
        assert header.stored_as(f"tokenizer.ggml.{key}") == base.stored_as(f"tokenizer.ggml.{key}")


def test_an_adapter_over_a_base_in_codes_goes_over_what_the_codes_stand_for(trained, tmp_path):
    run = trained("nf4", **RUNS["nf4"])
    exported = export_to(run, tmp_path / "both", format="gguf")
    merge_to(run, tmp_path / "merged.gguf", format="gguf")
    files = (exported.base, exported.out, tmp_path / "merged.gguf")
    base, updates, merged = (GgufHeader(file, "a file") for file in files)
    layer = open_named(run).model.model.layers[0].mlp.up_proj
    np.testing.assert_array_equal(base.expand("blk.0.ffn_up.weight"), layer.base.frozen().dense().numpy())
    for name in merged.tensors:
        wanted = base.expand(name)
        if f"{name}.lora_a" in updates.tensors:
            wanted = wanted + updates.expand(f"{name}.lora_b") @ updates.expand(f"{name}.lora_a")
        np.testing.assert_allclose(merged.expand(name), wanted, rtol=0, atol=2e-6, err_msg=name)


def test_ollamas_folder_asks_as_the_run_was_trained(trained, tmp_path):
    run = trained("lora")
    merged = merge_to(run, tmp_path / "ollama", format="ollama")
    text = (tmp_path / "ollama" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert 'PARAMETER stop """<|end|>"""' in text
    assert merged.next_command == f"ollama create NAME -f {tmp_path / 'ollama' / 'Modelfile'}"
    template = text.split('"""')[1]
    opened = open_named(run)
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    own = opened.renderer.tokenizer.decode(opened.renderer.turn(tuple(talk)))
    assert rendered_by_go(template, talk) == own
    veneer.load(tmp_path / "ollama" / "model.gguf")


@pytest.mark.parametrize(
    ("options", "kind", "refusal"),
    [
        ({"storage": "q8_0"}, ConfigError, "format = folder keeps weights in fp32, bf16, fp16, nf4, fp4, and not in"),
        ({"storage": "nf4", "format": "gguf"}, ConfigError, "format = gguf keeps weights in fp32, fp16, bf16, q8_0,"),
        ({"check": "rows.jsonl", "format": "gguf"}, ConfigError, "--check measures what 8 bits or fewer change"),
        ({"pre": "qwen2"}, ConfigError, "--pre is for GGUF files"),
        ({"pre": "qwen3", "format": "gguf"}, ModelError, "pre = 'qwen3' is not one of gpt-2, smollm,"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(options, kind, refusal, trained, tmp_path):
    with pytest.raises(kind, match=refusal):
        merge_to(trained("lora"), tmp_path / "out.gguf", **options)
    assert not (tmp_path / "out.gguf").exists()


def test_what_has_no_file_or_no_rows_is_refused(finished_classifier, folder, tmp_path):
    with pytest.raises(ModelError, match=r"is no causal language model"):
        merge_to(finished_classifier, tmp_path / "out.gguf", format="gguf")
    with pytest.raises(DataError, match=r"no held-out rows on which to measure what rounding changes"):
        merge_to(folder, tmp_path / "out.gguf", format="gguf", storage="q8_0")
    with pytest.raises(ConfigError, match=r"writes a folder; give OUT a name that does not end in \.gguf"):
        merge_to(folder, tmp_path / "out.gguf", format="ollama")


_MEASURED = """
import sys
from pathlib import Path
import veneer.commands.merge as verb
from veneer.host_memory import peak_host_memory, resident_memory, return_memory

def begin(*arguments, own=verb.draft_of, **options):
    global before
    return_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, after the model is loaded
    before = resident_memory()
    return own(*arguments, **options)

verb.draft_of = begin
for name in ("warm.gguf", "m.gguf"):  # what is imported at first stays
    merged = verb.merge_to(sys.argv[1], str(Path(sys.argv[2], name)), format="gguf", storage="q8_0", check=sys.argv[3])
print(merged.moved.tokens, peak_host_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be begun anew on Linux alone")
def test_of_a_base_in_codes_one_tensor_at_a_time_is_in_memory(tmp_path):
    words = tokenizer(merges=(("h", "e"), ("l", "l")))
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(
        vocab_size=len(words), hidden_size=512, intermediate_size=1408, num_hidden_layers=10, num_attention_heads=8,
        eos_token_id=words.eos_token_id,
    ))  # fmt: skip
    size = sum(parameter.nbytes for parameter in model.parameters())
    for part in (model, words):
        part.save_pretrained(tmp_path / "base")
    model, _ = veneer.load(tmp_path / "base", "nf4")
    veneer.attach(model, veneer.LoRA(rank=2))
    veneer.save(model, tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "he", "completion": "ll"}\n')
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURED, tmp_path / "adapter", tmp_path, tmp_path / "rows.jsonl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    tokens, grown = map(int, ran.stdout.split())
    assert tokens > 0
    assert grown < size / 4, "neither the merged weights nor their codes are in memory at once"
