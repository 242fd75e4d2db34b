"""A folder's own Python code is never run, whatever standard input answers: it is refused, or transformers' own class
serves."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf

import tiny
import veneer
from veneer.errors import ModelError
from veneer.models.own_tokenizer import tokenizer_in

pytestmark = pytest.mark.unit

_EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig):
    model_type = "evilnet"
class M(LlamaForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""
_MAP = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}


@pytest.fixture
def evil(tiny_folder, tmp_path):
    """A function that makes a model folder with code of its own, and fails the test where that code was run."""
    mark = tmp_path / "it-ran"

    def make(config=None, tokenizer=None):
        folder = shutil.copytree(tiny_folder, tmp_path / "evil")
        (folder / "evil.py").write_text(_EVIL.format(mark=str(mark)))
        for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            said = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(said | (changes or {})))
        return folder

    yield make
    assert not mark.exists()


def _rows(tmp_path):
    rows = [json.dumps({"prompt": f"{letter}:", "completion": "b"}) for letter in "abcdefghijklmnopqrst"]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("verb", ["inspect", "plan", "generate", "chat", "train", "quantize"])
def test_every_command_refuses_it_in_one_sentence(verb, evil, refused, tmp_path):
    folder = evil({"auto_map": _MAP, "model_type": "evilnet"})
    more = {
        "generate": ["hello"],
        "quantize": [tmp_path / "out"],
        "train": ["--data", _rows(tmp_path), "--output", tmp_path / "run"],
    }
    source = ["--model", folder] if verb == "train" else [folder]
    assert refused(verb, *source, *more.get(verb, []), stdin="y\n" * 20) == (
        f"{folder} needs its own code (evil.C, evil.M, as auto_map in its config.json says), which Veneer does not "
        f"run; take a model whose model_type transformers has a class for."
    )


def test_an_adapter_over_it_is_refused_likewise(evil, tiny_folder, refused, tmp_path):
    base = evil()
    model = veneer.attach(veneer.load(base)[0], veneer.LoRA(rank=2))
    veneer.save(model, tmp_path / "adapter")
    said = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(said | {"auto_map": _MAP, "model_type": "evilnet"}))
    assert "needs its own code (evil.C, evil.M" in refused("generate", tmp_path / "adapter", "hello", stdin="y\n" * 20)


def test_a_tokenizer_alone_that_needs_it(evil, refused):
    folder = evil(tokenizer={"auto_map": {"AutoTokenizer": [None, "evil.T"]}, "tokenizer_class": "T"})
    sentence = (
        f"The tokenizer of {folder} needs its own code (evil.T, as auto_map in its tokenizer_config.json says), which "
        f"Veneer does not run; save one of transformers' own beside the model with tokenizer.save_pretrained."
    )
    assert refused("generate", folder, "hello", stdin="y\n" * 20) == sentence
    with pytest.raises(ModelError, match="needs its own code"):
        tokenizer_in(folder)


def test_a_class_for_this_task_that_transformers_has_not(evil, refused):
    """A BERT that generates by code of its own: transformers knows the model type, and not such a class."""
    folder = evil({"model_type": "sam", "architectures": ["MForCausalLM"], "auto_map": _MAP})
    assert refused("plan", folder, stdin="y\n" * 20).endswith(
        "needs its own code (auto_map in its config files), which Veneer does not run."
    )


def test_what_transformers_knows_is_loaded_with_its_own_class(evil, tiny_folder):
    folder = evil({"auto_map": _MAP}, {"auto_map": {"AutoTokenizer": [None, "evil.T"]}})
    model, tokenizer = veneer.load(folder)
    assert type(model) is tf.LlamaForCausalLM
    inputs = {"input_ids": torch.tensor([[72, 69, 76]])}
    assert torch.equal(tiny.logits(model, inputs), tiny.logits(veneer.load(tiny_folder)[0], inputs))
    assert tokenizer("hello").input_ids == veneer.load(tiny_folder)[1]("hello").input_ids


def test_every_call_that_reads_a_model_says_so():
    """`trust_remote_code=False`, written out beside every `from_pretrained` and `from_config` of the source."""
    silent, held = [], 0
    for file in Path(veneer.__file__).parent.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        named = [
            node
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config")
            and ast.unparse(node) != "transformers.GenerationConfig.from_pretrained"  # which has no code of its own
        ]  # fmt: skip
        saying = {
            ast.unparse(part)
            for call in calls
            if any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in call.keywords)
            for part in (call.func, *call.args)
        }
        silent += [f"{file.name}: {ast.unparse(node)}" for node in named if ast.unparse(node) not in saying]
        held += len(named)
    assert silent == []
    assert held >= 6, "else this test looks at nothing"
