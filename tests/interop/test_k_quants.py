"""K-quants that llama.cpp makes of the file that Veneer writes: which types it has, and that they are read again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import gguf
import pytest
import torch
import transformers as tf

import veneer
from peers import ask, python_with
from tokens import tokenizer
from veneer.commands.merge import merge_to
from veneer.models.gguf_header import GgufHeader
from veneer.models.gguf_k_quants import K_QUANTS

pytestmark = pytest.mark.interop

IDS = [(7 * i + 3) % 250 for i in range(24)]
LIBRARY = ("llama_cpp", "diskcache")  # what its import needs and this environment has not


@pytest.fixture(scope="module", autouse=True)
def _library(tmp_path_factory):
    """llama-cpp-python of build/peers, importable here and in the processes that are started."""
    python = python_with("llama_cpp")
    if python is None:
        pytest.skip("llama-cpp-python is not installed; make build/peers/ready installs it")
    place = tmp_path_factory.mktemp("library")
    code = (
        f"import importlib.util as u; print(*(u.find_spec(name).submodule_search_locations[0] for name in {LIBRARY}))"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    for folder in map(Path, found):
        (place / folder.name).symlink_to(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place))
        patch.syspath_prepend(str(place))
        yield


def _base(folder, **sizes):
    words = tokenizer(merges=(("h", "e"), ("l", "l")))
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(
        vocab_size=len(words), num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=96, eos_token_id=words.eos_token_id, **sizes,
    ))  # fmt: skip
    for parameter in model.parameters():  # large enough that rounding shows
        parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder.parent / "rows.jsonl").write_text('{"prompt": "hello", "completion": " there, all"}\n' * 4)
    return folder


def test_each_is_read_as_gguf_expands_it_and_fewer_bits_move_more(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = _base(tmp_path / "base", hidden_size=256, intermediate_size=512)
    moved = {}
    for storage, number in K_QUANTS.items():
        file = tmp_path / f"{storage}.gguf"
        made = merge_to(base, file, format="gguf", storage=storage, check=str(tmp_path / "rows.jsonl"))
        assert made.notes == []
        moved[storage] = made.moved.kl
        header = GgufHeader(file, storage)
        assert header.metadata["general.file_type"] == number
        kind = header.tensors["blk.0.attn_q.weight"].type
        assert kind.name.lower() == storage[:4]
        layer = header.tensors["blk.0.ffn_up.weight"]
        own = veneer.load(file)[0].state_dict()["model.layers.0.mlp.up_proj.weight"]
        read = gguf.GGUFReader(file)
        packed = next(tensor for tensor in read.tensors if tensor.name == layer.name)
        assert torch.equal(own, torch.from_numpy(gguf.dequantize(packed.data, packed.tensor_type)))
    assert 0 < moved["q6_k"] < moved["q5_k_m"] < moved["q4_k_m"] < moved["q3_k_m"] < moved["q2_k"]


def test_llama_cpp_answers_from_it_as_veneer_does_from_its_values(tmp_path, monkeypatch):
    """llama.cpp rounds what it multiplies by, too, so that not all digits agree."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, file = _base(tmp_path / "base", hidden_size=256, intermediate_size=512), tmp_path / "m.gguf"
    merge_to(base, file, format="gguf", storage="q6_k", check=str(tmp_path / "rows.jsonl"))
    theirs = ask("llama_cpp", "llama_cpp_logits.py", json.dumps({"model": str(file), "ids": IDS}))["logits"]
    with torch.no_grad():
        own = veneer.load(file)[0](torch.tensor([IDS])).logits[0]
    difference = (torch.tensor(theirs) - own).norm() / own.norm()
    assert difference < 0.05


def test_what_llama_cpp_keeps_otherwise_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = _base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    made = merge_to(
        base, tmp_path / "ollama", format="ollama", storage="q4_k_m", check=str(tmp_path / "rows.jsonl")
    )  # fmt: skip
    assert made.notes[0].startswith("16 matrices have rows of no multiple of 256 values, so llama.cpp keeps them in")
    assert sorted(file.name for file in (tmp_path / "ollama").iterdir()) == ["Modelfile", "model.gguf"]
    assert made.moved.kl < 0.1
    veneer.load(tmp_path / "ollama" / "model.gguf")
