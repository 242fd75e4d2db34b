"""What a report says about loading an adapter elsewhere: its Python is run with the installed peft and transformers,
its veneer commands with this one; vLLM's and llama.cpp's commands are compared with what they should be."""

from __future__ import annotations

import io
import shlex
import sys

import bitsandbytes as bnb
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tiny
import veneer
from tokens import tokenizer
from veneer.cli import main
from veneer.reporting.heatmap import ranks_of
from veneer.reporting.loading import recipes
from veneer.runs.history import RunHistory
from veneer.runs.opened import open_named

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function from options to the folder of a short run."""
    place = tmp_path_factory.mktemp("trained")
    tiny.llama_folder(place / "base", tokenizer(merges=(("h", "e"), ("l", "l"))))
    rows = place / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "{word}:", "completion": " yes"}}\n' for word in ("bat", "big", "cop", "dun"))
    )

    def run(name, model=None, **options):
        folder = place / name
        if not folder.is_dir():
            veneer.train(
                str(model or place / "base"), data=str(rows), output=str(folder), steps=4, held_out=0,
                learning_rate=1e-1, console=Console(file=io.StringIO()), **options,
            )  # fmt: skip
        return folder

    return run


def _recipes(folder, rank=8):
    ranks = {"model.layers.0.self_attn.q_proj": rank}
    return {recipe.title: recipe for recipe in recipes(RunHistory.read(folder), ranks)}


def _do(recipe, monkeypatch) -> dict[str, object]:
    """Run its blocks; what its Python defines."""
    namespace: dict[str, object] = {}
    for language, text in recipe.parts:
        if language == "python":
            exec(text, namespace)
            continue
        for line in text.splitlines():
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            main()
    return namespace


def _ids(opened):
    return torch.tensor([opened.renderer.encode("bat: yes")])


OPTIONS = {
    "lora": {},
    "adalora": {"method": "adalora", "initial_rank": 4, "target_rank": 2},
    "patterns": {"rank_pattern": {"v_proj": 4}, "rslora": True},
    "whole": {"train_also": ["lm_head"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_peft_and_transformers_give_the_runs_own_logits(trained, name, monkeypatch, capsys):
    folder = trained(name, **OPTIONS[name])
    opened = open_named(folder)
    ids = _ids(opened)
    found = _recipes(folder)
    with torch.no_grad():
        own = opened.model(ids).logits
        with veneer.disabled(opened.model):
            assert (opened.model(ids).logits - own).abs().max() > 0.1, "the adapter does something"
        for title in ("peft", "transformers, without peft"):
            said = _do(found[title], monkeypatch)
            model, tokenizer = said["model"].eval(), said["tokenizer"]
            torch.testing.assert_close(model(ids).logits, own, rtol=1e-4, atol=1e-4)
            assert tokenizer("bat: yes", add_special_tokens=False).input_ids == ids[0].tolist()


@pytest.mark.parametrize("name", ["adalora", "patterns"])
def test_what_vllm_and_llama_cpp_cannot_read_is_exported_first(trained, name, monkeypatch, capsys):
    folder = trained(name, **OPTIONS[name])
    found = _recipes(folder, rank=4)
    base = str(RunHistory.read(folder).config.model)
    (_, vllm), (_, llama) = found["vLLM"].parts[0], found["llama.cpp"].parts[0]
    export, *serve = vllm.splitlines()
    assert export == f"veneer export {folder} {folder / 'plain'}"
    assert serve == [
        f"vllm serve {base} --enable-lora --max-lora-rank 8 \\",
        f"    --lora-modules {name}={folder / 'plain'}",
    ]
    assert llama.splitlines() == [
        f"veneer export {folder} {folder / 'plain-gguf'} --format gguf",
        f"llama-cli -m {folder / 'plain-gguf' / 'base.gguf'} --lora {folder / 'plain-gguf' / 'adapter.gguf'}",
    ]
    monkeypatch.setattr(sys, "argv", shlex.split(llama.splitlines()[0]))
    main()
    assert sorted(file.name for file in (folder / "plain-gguf").iterdir()) == ["adapter.gguf", "base.gguf"]
    monkeypatch.setattr(sys, "argv", shlex.split(export))
    main()
    from peft import AutoPeftModelForCausalLM

    opened = open_named(folder)
    with torch.no_grad():
        plain = AutoPeftModelForCausalLM.from_pretrained(folder / "plain").eval()
        torch.testing.assert_close(plain(_ids(opened)).logits, opened.model(_ids(opened)).logits, rtol=1e-4, atol=1e-4)


def test_a_plain_lora_is_taken_as_it_is(trained):
    folder = trained("lora")
    vllm = _recipes(folder)["vLLM"].parts[0][1]
    assert "export" not in vllm
    assert f"--lora-modules lora={folder / 'adapter'}" in vllm
    assert "--max-lora-rank 8 " in vllm
    assert "--max-lora-rank 64 " in _recipes(folder, rank=48)["vLLM"].parts[0][1]
    beyond = _recipes(folder, rank=1000)["vLLM"]
    assert beyond.parts[0][1].splitlines() == [f"veneer merge {folder} {folder}/merged", f"vllm serve {folder}/merged"]
    assert beyond.note == "vLLM takes ranks up to 512, and this is 1000, so the adapter is merged first."


def test_modules_trained_whole_are_merged_first(trained, monkeypatch, capsys):
    folder = trained("whole", **OPTIONS["whole"])
    found = _recipes(folder)
    merged = folder / "merged"
    assert found["vLLM"].parts[0][1].splitlines() == [f"veneer merge {folder} {merged}", f"vllm serve {merged}"]
    assert "this run trained more (lm_head)" in found["vLLM"].note
    merge, use = found["llama.cpp"].parts[0][1].splitlines()
    assert (merge, use) == (f"veneer merge {folder} {merged}.gguf --format gguf", f"llama-cli -m {merged}.gguf")
    ollama = found["Ollama"].parts[0][1].splitlines()
    for command in (merge, ollama[0]):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        main()
    assert (folder / "merged.gguf").is_file()
    assert ollama[1] == f"ollama create whole -f {merged}-ollama/Modelfile"
    assert (folder / "merged-ollama" / "Modelfile").is_file()


def test_doras_magnitudes_are_merged_first(trained):
    folder = trained("dora", dora=True)
    found = _recipes(folder)
    assert found["vLLM"].parts[0][1].splitlines()[0] == f"veneer merge {folder} {folder / 'merged'}"
    assert "this run trained more (magnitudes, by DoRA)" in found["vLLM"].note
    assert "convert_lora" not in found["llama.cpp"].parts[0][1]
    shapes = {key: tensor.shape for key, tensor in load_file(folder / "adapter/adapter_model.safetensors").items()}
    assert set(ranks_of(shapes).values()) == {8}


def test_a_base_in_4_bits_is_loaded_in_4_bits(trained, monkeypatch):
    found = _recipes(trained("nf4", storage="nf4", double_quantisation=True))["peft"]
    model = _do(found, monkeypatch)["model"]
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers
    assert {(layer.weight.quant_type, layer.weight.compress_statistics) for layer in layers} == {("nf4", True)}
    other = _recipes(trained("int4", storage="int4"))["peft"]
    assert "BitsAndBytes" not in other.parts[0][1]
    assert "trained over a base in int4" in other.note


def test_a_classifier_is_one_and_neither_vllms_nor_llama_cpps(finished_classifier, monkeypatch):
    found = _recipes(finished_classifier)
    assert found["vLLM"].parts == found["llama.cpp"].parts == found["Ollama"].parts == found["MLX"].parts == ()
    assert "this is a classifier" in found["vLLM"].note
    opened = open_named(finished_classifier)
    model = _do(found["peft"], monkeypatch)["model"].eval()
    with torch.no_grad():
        torch.testing.assert_close(model(_ids(opened)).logits, opened.model(_ids(opened)).logits, rtol=1e-4, atol=1e-4)


def test_a_base_in_a_gguf_file_is_first_written_as_a_folder(trained, tmp_path, monkeypatch):
    folder = trained("lora")
    run = RunHistory.read(folder)
    run.config = run.config.model_copy(update={"model": "/models/some model.gguf"})
    found = {recipe.title: recipe for recipe in recipes(run, {})}
    first = next(iter(found.values()))
    assert first.title == "First: the base as a transformers folder"
    assert "veneer.load('/models/some model.gguf')" in first.parts[0][1]
    assert "from_pretrained('base')" in found["peft"].parts[0][1]
    assert found["llama.cpp"].parts[0][1].splitlines()[-1] == (
        f"llama-cli -m '/models/some model.gguf' --lora {folder / 'plain-gguf' / 'adapter.gguf'}"
    )
    run.config = run.config.model_copy(update={"model": "smollm2-135m-instruct"})
    last = next(recipe for recipe in recipes(run, {}) if recipe.title == "llama.cpp").parts[0][1]
    assert f"--lora {folder / 'plain-gguf' / 'adapter.gguf'}" in last
