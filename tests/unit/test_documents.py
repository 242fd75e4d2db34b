"""JSON and YAML files of others: what is wrong with one is said in one line."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

import veneer
from veneer.documents import parsed_json, read_json, read_yaml
from veneer.errors import ConfigError
from veneer.runs.history import RunHistory
from veneer.training.config import TrainConfig
from veneer.updates.peft_config import read_fields

pytestmark = pytest.mark.unit
DEEP = "[" * 100_000


def test_what_is_right_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"ä": [1, 2.5, null]}', encoding="utf-8")
    (tmp_path / "a.yaml").write_text("ä: [1, 2.5, null]", encoding="utf-8")
    assert read_json(tmp_path / "a.json") == read_yaml(tmp_path / "a.yaml") == {"ä": [1, 2.5, None]}
    assert parsed_json(b"[1]") == [1]


@pytest.mark.parametrize(
    "text", [DEEP.encode(), b"\xff", b"{", b"1" * 5000, b"", b"\xef\xbb\xbf{}"],
    ids=["deep", "no UTF-8", "cut", "digits", "empty", "mark"],
)  # fmt: skip
def test_damaged_json_is_one_kind_of_error(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError) as raised:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["[" * 3000, "d: 2020-99-99", "d: !!timestamp x", "d: !!float x", "d: " + "1" * 5000,
     "d: !!python/object:os.system", "a: b: c", "\x00", "a: *none", "? [a]\n: b"],
)  # fmt: skip
def test_damaged_yaml_is_one_kind_of_error(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 300
    with pytest.raises(ConfigError, match=r"a\.yaml cannot be read as YAML: "):
        TrainConfig.read(tmp_path / "a.yaml")


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read(tmp_path / "pipe")


def test_a_folder_of_them_is_refused_or_noted_in_a_sentence(tmp_path):
    (tmp_path / "adapter_config.json").write_text(DEEP)
    with pytest.raises(veneer.VeneerError, match=r"adapter_config\.json cannot be read as JSON: it is nested too deep"):
        read_fields(tmp_path)
    TrainConfig(model="tiny", data="rows.jsonl", output=str(tmp_path)).write(tmp_path / "config.yaml")
    for name in ("rows.json", "environment.json", "plan.json", "evaluation.json"):
        (tmp_path / name).write_text(DEEP)
    (tmp_path / "metrics.jsonl").write_text(f"{DEEP}\n")
    notes = RunHistory.read(tmp_path).notes
    assert len(notes) == 5, notes
    assert all("nested too deeply" in note for note in notes[1:])


def test_files_are_read_in_one_place():
    """Elsewhere `json.loads` takes what Veneer itself has just made, or rows, which have their own line numbers."""
    own = {"documents.py", "files.py", "machine.py", "tensor_file.py", "checkpoint.py", "partial.py", "identity.py",
           "work.py", "run.py", "budget.py", "spectrum.py", "own_tokenizer.py", "gguf_tokenizer.py", "gguf_words.py",
           "go_template.py"}  # fmt: skip
    calling = {
        file.name
        for file in Path(veneer.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.loads", "json.load", "yaml.safe_load")
    }
    assert calling == own
