"""veneer export --format gguf, ollama and mlx: adapter over base is the merged model, in each form; what a form cannot
carry is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import tiny
import veneer
from tokens import tokenizer
from veneer.cli import cli
from veneer.commands.export import export_to
from veneer.commands.merge import merge_to
from veneer.errors import AdapterFileError, ConfigError, ModelError
from veneer.models.gguf_header import GgufHeader

pytestmark = pytest.mark.unit

KINDS = {
    "lora": veneer.LoRA(rank=4, alpha=6),
    "rslora": veneer.LoRA(rank=4, alpha=8, rslora=True),
    "patterns": veneer.LoRA(rank=4, rank_pattern={"0.*q_proj": 2, "v_proj": 7}, alpha_pattern={"q_proj": 3}),
    "adalora": veneer.AdaLoRA(initial_rank=4, target_rank=2, total_steps=6, tinit=1, tfinal=1),
    "embedding": veneer.LoRA(rank=3, targets=["embed_tokens", "q_proj"]),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    tiny.llama_folder(place, tokenizer(merges=(("h", "e"), ("l", "l"))))
    return place


def adapted(base, folder, config, storage="fp32"):
    """The folder of an adapter that was trained a little over ``base``."""
    model, _ = veneer.load(base, storage)
    torch.manual_seed(0)
    veneer.attach(model, config)
    ids = torch.arange(24).reshape(2, 12) + 3
    tiny.train_steps(model, {"input_ids": ids, "labels": ids}, steps=6, lr=0.05)
    veneer.save(model, folder)
    return folder


def tensors(file):
    header = GgufHeader(file, str(file))
    return {name: header.expand(name) for name in header.tensors}, header.metadata


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_over_its_base_is_the_merged_file(kind, base, tmp_path):
    """The tensors of llama.cpp's sum: W + b a; an embedding's A is looked up by its rows."""
    folder = adapted(base, tmp_path / "a", KINDS[kind])
    exported = export_to(folder, tmp_path / "both", format="gguf")
    assert (exported.out, exported.base) == (tmp_path / "both" / "adapter.gguf", tmp_path / "both" / "base.gguf")
    merge_to(folder, tmp_path / "merged.gguf", format="gguf")
    (own, _), (updates, said), (merged, _) = map(tensors, (exported.base, exported.out, tmp_path / "merged.gguf"))
    assert (said["general.type"], said["adapter.type"], said["general.architecture"]) == ("adapter", "lora", "llama")
    assert "adapter.lora.alpha" not in said
    changed = {name.removesuffix(".lora_a") for name in updates if name.endswith(".lora_a")}
    assert {name.removesuffix(".lora_b") for name in updates if name.endswith(".lora_b")} == changed
    for name, weight in merged.items():
        wanted = own[name]
        if name in changed:
            a, b = updates[f"{name}.lora_a"], updates[f"{name}.lora_b"]
            wanted = wanted + (a @ b.T if name == "token_embd.weight" else b @ a)
            assert np.abs(wanted - own[name]).max() > 1e-4, name
        np.testing.assert_allclose(weight, wanted, rtol=0, atol=1e-6, err_msg=name)
    ranks = {len(updates[f"{name}.lora_a"]) for name in changed if name != "token_embd.weight"}
    assert ranks == {"patterns": {2, 4, 7}, "embedding": {3}}.get(kind, ranks)


def test_over_a_base_in_a_file_the_adapter_alone_is_written(base, tmp_path):
    merge_to(base, tmp_path / "base.gguf", format="gguf")
    folder = adapted(tmp_path / "base.gguf", tmp_path / "a", KINDS["lora"])
    ran = CliRunner().invoke(cli, ["export", str(folder), str(tmp_path / "out"), "--format", "gguf"])
    assert ran.exit_code == 0, ran.output
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["adapter.gguf"]
    assert f"Next: llama-cli -m {tmp_path / 'base.gguf'} --lora {tmp_path / 'out' / 'adapter.gguf'}" in ran.output
    export_to(folder, tmp_path / "alone.gguf", format="gguf")
    assert (tmp_path / "alone.gguf").read_bytes() == (tmp_path / "out" / "adapter.gguf").read_bytes()
    exported = export_to(folder, tmp_path / "ollama", format="ollama")
    text = (tmp_path / "ollama" / "Modelfile").read_text()
    assert text.startswith(f"FROM {tmp_path / 'base.gguf'}\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert exported.next_command.startswith("ollama create NAME -f ")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding"])
def test_mlx_lm_would_compute_the_same(kind, base, tmp_path):
    """x a b with one rank and scale 1, the names relative to a layer. tests/interop asks mlx-lm itself."""
    folder = adapted(base, tmp_path / "a", KINDS[kind])
    export_to(folder, tmp_path / "mlx", format="mlx")
    fields = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    rank, keys = fields["lora_parameters"]["rank"], set(fields["lora_parameters"]["keys"])
    assert (fields["num_layers"], fields["lora_parameters"]["scale"]) == (2, 1.0)
    model, _ = veneer.load(base)
    before = tiny.state(model)
    veneer.load_adapter(model, folder)
    veneer.merge(model, reversible=False)
    held = load_file(tmp_path / "mlx" / "adapters.safetensors")
    found = set()
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        a, b = held.get(f"{module}.lora_a"), held.get(f"{module}.lora_b")
        if a is None:
            assert torch.equal(tensor, before[name])
            continue
        assert a.shape[1] == b.shape[0] == rank
        torch.testing.assert_close((a @ b).t(), tensor - before[name], rtol=0, atol=1e-6)
        found.add(module.split(".", 3)[3])
    assert found == keys


def test_what_a_form_cannot_carry_is_refused_by_name(base, tmp_path):
    folder = adapted(base, tmp_path / "embedding", KINDS["embedding"])
    with pytest.raises(AdapterFileError, match=r"adapts model\.embed_tokens, which is in no layer, .* merge it"):
        export_to(folder, tmp_path / "out", format="mlx")
    whole = adapted(base, tmp_path / "whole", veneer.LoRA(rank=2, train_also=["lm_head"]))
    for form in ("gguf", "mlx", "ollama"):
        with pytest.raises(AdapterFileError, match=r"trains more than low-rank updates .*; merge it into its base"):
            export_to(whole, tmp_path / "out", format=form)
    with pytest.raises(ConfigError, match=r"--no-padded is for a PEFT folder; gguf has a rule of its own for ranks"):
        export_to(folder, tmp_path / "out", format="gguf", padded=False)
    with pytest.raises(ModelError, match=r"exists and is not an empty folder"):
        export_to(folder, base, format="gguf")
    assert not (tmp_path / "out").exists()


def test_bases_that_a_form_does_not_know_are_refused_with_those_that_it_knows(tmp_path):
    words = tokenizer()
    for name in ("gptneox", "gpt2", "llama-tied"):
        model = tiny.build(name)
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    targets = {"gptneox": "all-linear", "gpt2": "all-linear", "llama-tied": ["embed_tokens"]}
    folders = {}
    for name, chosen in targets.items():
        model = veneer.load(tmp_path / name)[0]
        veneer.attach(model, veneer.LoRA(rank=2, targets=chosen))
        veneer.save(model, tmp_path / f"{name}-adapter")
        folders[name] = tmp_path / f"{name}-adapter"
    out = tmp_path / "out"
    with pytest.raises(ModelError, match=r"is a gpt_neox, which Veneer does not write as GGUF; it writes llama,"):
        export_to(folders["gptneox"], out, format="gguf")
    with pytest.raises(ModelError, match=r"is a gpt2, whose adapters are not written for mlx-lm; those of llama,"):
        export_to(folders["gpt2"], out, format="mlx")
    with pytest.raises(ModelError, match=r"Ollama applies no adapter to a gpt2, and does not say so; merge it"):
        export_to(folders["gpt2"], out, format="ollama")
    with pytest.raises(AdapterFileError, match=r"adapts model\.embed_tokens, whose weight embedding and head share"):
        export_to(folders["llama-tied"], out, format="gguf")
    assert not out.exists()
