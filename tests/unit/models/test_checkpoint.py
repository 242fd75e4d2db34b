"""What a source resolves to, once: its files, its kind, and what it is for."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers as tf

from gguf_file import write_gguf
from tokens import tokenizer
from veneer.data.read import read_rows
from veneer.errors import ConfigError, ModelError
from veneer.models import checkpoint as module
from veneer.models.checkpoint import Checkpoint, checkpoint_of
from veneer.models.gguf_file import GgufFile
from veneer.models.load import load
from veneer.models.tensors import SafetensorsFolder
from veneer.runs.prepare import prepare
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tokenizer(merges=(("h", "e"), ("l", "l")))
    config = tf.LlamaConfig(
        vocab_size=len(made), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=made.eos_token_id,
    )  # fmt: skip
    write_gguf(tmp_path / "tiny.gguf", tf.LlamaForCausalLM(config), made)
    return tmp_path / "tiny.gguf"


def test_a_folder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    made = Checkpoint(tiny_folder.name)
    assert (made.called, made.name, made.path, made.kind) == (tiny_folder.name, str(tiny_folder), tiny_folder, "folder")
    assert made.config is made.config, "read once"
    assert (made.dtype, made.generates_text, made.is_bitsandbytes) == (torch.float32, True, False)
    assert made.weight_bytes() == (tiny_folder / "model.safetensors").stat().st_size
    assert type(made.tensors()) is SafetensorsFolder
    assert made.tokenizer() is not made.tokenizer()
    assert checkpoint_of(made) is made


def test_a_gguf_file_and_what_it_was_converted_to(gguf):
    file = Checkpoint(gguf)
    assert (file.kind, file.path, file.dtype, file.generates_text) == ("gguf", gguf, torch.float32, True)
    assert type(file.tensors()) is GgufFile
    load(file)
    assert file.kind == "gguf", "it goes on as it began"
    kept = Checkpoint(gguf)
    assert (kept.kind, kept.path, kept.name) == ("converted", file.cache, str(gguf))
    assert type(kept.tensors()) is SafetensorsFolder
    assert kept.weight_bytes() == gguf.stat().st_size


def test_the_type_of_the_weights(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    for said, dtype in (("bfloat16", torch.bfloat16), ("float64", torch.float32), (None, torch.float32)):
        (folder / "config.json").write_text(json.dumps({**config, "dtype": said}))
        assert Checkpoint(folder).dtype is dtype


def test_what_it_is_for(tiny_folder, tiny_encoder):
    text, encoder = Checkpoint(tiny_folder), Checkpoint(tiny_encoder)
    assert (text.task(), text.task("auto", ["a", "b"]), text.task("seq2seq")) == ("causal", "classification", "seq2seq")
    assert encoder.task("auto", ["a", "b"]) == "classification"
    with pytest.raises(ModelError, match="is a BertModel, which generates no text"):
        encoder.task()
    with pytest.raises(ConfigError, match=r"^task = 'poetry' is not one of auto, causal, seq2seq, classification"):
        text.task("poetry")


def test_of_a_hub_id_no_weights_are_needed_before_they_are_read(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copy(tiny_folder / "config.json", snapshot)
    made = Checkpoint("someone/tiny")
    assert made.generates_text
    assert made.weight_bytes() == 0
    with pytest.raises(ModelError, match=r"^The copy of someone/tiny in the hub's cache lacks its weights"):
        made.tensors()
    for file in tiny_folder.iterdir():
        shutil.copy(file, snapshot)
    assert made.path == snapshot
    assert load(made)[0].name_or_path == "someone/tiny"


def test_a_run_resolves_its_model_once(tiny_folder, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "row {word}", "completion": " yes"}}\n' for word in ("one", "two", "six")))
    assert len(read_rows(rows)) == 3
    resolved, real = [], module.resolve
    monkeypatch.setattr(module, "resolve", lambda source, **how: (resolved.append(source), real(source, **how))[1])
    prepare(TrainConfig(model=str(tiny_folder), data=str(rows), output=str(tmp_path / "run"), storage="nf4"))
    assert resolved == [str(tiny_folder)]
