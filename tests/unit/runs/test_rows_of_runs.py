"""Runs over rows as people have them: from another folder, in another form, with classes that occur once."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from rich.console import Console

import veneer
from families import FAMILIES
from tokens import tokenizer
from veneer.errors import ConfigError, DataError
from veneer.runs.folder import RunFolder
from veneer.runs.opened import open_named

pytestmark = pytest.mark.unit


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _train(**options):
    console = Console(file=io.StringIO(), width=400)
    options = {"steps": 2, "batch_size": 4, "rank": 2, "check_memory": False, **options}
    return veneer.train(options.pop("model"), console=console, **options), console.file.getvalue()


def _with_template(folder, source, chat):
    shutil.copytree(source, folder)
    made = tokenizer(chat=chat)
    if chat is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    made.save_pretrained(folder)
    return str(folder)


WORDS = ("one", "two", "six", "ten", "red", "tan")
ORDERS = [{"system": "S", "instruction": f"Say {word}.", "output": word} for word in WORDS]


def test_a_run_is_evaluated_asked_and_resumed_from_another_folder(tiny_folder, rows_file, tmp_path, monkeypatch):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir(), away.mkdir()
    shutil.copytree(tiny_folder, home / "tiny")
    shutil.copy(rows_file, home / "rows.jsonl")
    monkeypatch.chdir(home)
    _train(model="tiny", data="rows.jsonl", output="run", held_out=8, steps=2, schedule="constant")
    monkeypatch.chdir(away)
    (away / "rows.jsonl").write_text('{"prompt": "another", "completion": " file"}\n')
    assert veneer.evaluate("../home/run", examples=0).rows == 8
    assert open_named("../home/run").adapted
    assert veneer.resume("../home/run", steps=3, console=Console(file=io.StringIO())).steps == 3
    assert RunFolder("../home/run").config().data == str(home / "rows.jsonl")


def test_a_run_is_moved_with_its_rows_and_model(tiny_folder, rows_file, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(tiny_folder, home / "tiny")
    shutil.copy(rows_file, home / "rows.jsonl")
    monkeypatch.chdir(home)
    _train(model="tiny", data="rows.jsonl", output="runs/a", held_out=8)
    assert RunFolder("runs/a").config().data == "rows.jsonl", "as it was typed, where it was typed"
    monkeypatch.chdir(tmp_path)
    home.rename(tmp_path / "moved")
    config = RunFolder("moved/runs/a").config()
    assert (config.model, config.data) == (str(tmp_path / "moved" / "tiny"), str(tmp_path / "moved" / "rows.jsonl"))


def test_instructions_on_a_base_without_a_template(tiny_folder, tmp_path):
    model = _with_template(tmp_path / "base", tiny_folder, None)
    data = _write(tmp_path / "orders.jsonl", ORDERS)
    result, said = _train(model=model, data=str(data), output=str(tmp_path / "run"), held_out=2)
    assert "has no chat template, so instructions are put in the form alpaca (### Instruction: …)" in said
    opened = open_named(tmp_path / "run")
    asked = opened.renderer.tokenizer.decode(opened.renderer.turn(({"role": "user", "content": "Say one."},)))
    assert opened.chat
    assert asked.endswith("### Instruction:\nSay one.\n\n### Response:\n")
    assert veneer.evaluate(tmp_path / "run", examples=1).rows == 2
    assert result.tokenizer.chat_template.startswith("{% if messages[0].role != 'system'")


def test_a_template_of_a_file_is_kept_with_the_run(tiny_folder, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{{ mark }}<|end|>{% endfor %}")
    data = _write(tmp_path / "orders.jsonl", ORDERS)
    options = {"template": str(file), "template_arguments": {"mark": "!"}, "learn": "last", "fold_turns": True}
    _train(model=str(tiny_folder), data=str(data), output=str(tmp_path / "run"), held_out=0, **options)
    file.unlink()
    veneer.resume(tmp_path / "run", steps=3, console=Console(file=io.StringIO()))
    opened = open_named(tmp_path / "run")
    turn = opened.renderer.turn(({"role": "user", "content": "a"},))
    assert opened.renderer.tokenizer.decode(turn) == "[S\n\na]!<|end|>", "after the system message of all its rows"
    assert (opened.renderer.learn, opened.renderer.fold_turns) == ("last", True)


def test_options_of_templates_that_make_no_sense_are_refused(tiny_folder, tmp_path):
    data = str(_write(tmp_path / "orders.jsonl", ORDERS))
    with pytest.raises(ConfigError, match=r"template = 'chatmll' is none of .* Did you mean 'chatml'\?"):
        _train(model=str(tiny_folder), data=data, output=str(tmp_path / "run"), template="chatmll")
    with pytest.raises(DataError, match="template_arguments names 'enable_thinking', which the chat template of"):
        _train(
            model=str(tiny_folder), data=data, output=str(tmp_path / "run"),
            template_arguments={"enable_thinking": "false"},
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["thinking", "opens thinking"])
def test_a_run_over_a_thinking_template_can_be_evaluated_and_asked(family, tiny_folder, tmp_path):
    model = _with_template(tmp_path / "base", tiny_folder, FAMILIES[family])
    talks = [
        {"messages": [{"role": role, "content": f"{word} {n}"} for n in range(2) for role in ("user", "assistant")]}
        for word in ("one", "two", "six", "ten", "red", "tan")
    ]
    _, said = _train(model=model, data=str(_write(tmp_path / "d", talks).rename(tmp_path / "d.jsonl")),
                     output=str(tmp_path / "run"), held_out=2)  # fmt: skip
    assert "became 8, one for each answer: the chat template changes earlier turns once others follow" in said
    comparison = veneer.evaluate(tmp_path / "run", examples=1)
    assert (comparison.rows, comparison.examples[0].expected[-1]) == (2, "1")
    opened = open_named(tmp_path / "run")
    assert opened.renderer.ends() == [opened.renderer.tokenizer.eos_token_id]


@pytest.mark.parametrize("seed", range(2))
def test_a_class_that_occurs_once_stops_no_run(tiny_encoder, tmp_path, seed):
    rows = [{"text": f"row {word}", "label": "ab"[n % 2]} for n, word in enumerate("bcdfghklmn")]
    data = _write(tmp_path / "d.jsonl", [*rows, {"text": "rare", "label": "c"}, {"text": "none", "label": ""}])
    _, said = _train(model=str(tiny_encoder), data=str(data), output=str(tmp_path / "run"), held_out=4, seed=seed)
    assert "1 class occurs once among the rows (c): kept for training, and not measured." in said
    assert "3 classes: a 5, b 5, c 1." in said
    assert "d.jsonl:12) left out: the label is empty." in said
    assert RunFolder(tmp_path / "run").rows()["classes"] == ["a", "b", "c"]


def test_classes_are_refused_before_a_model_is_made(tiny_encoder, tmp_path):
    rows = _write(tmp_path / "d.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    held_out = _write(tmp_path / "h.jsonl", [{"text": "z", "label": "q"}])
    with pytest.raises(DataError, match=r"h.jsonl:1 has the label 'q', which no training row has; these have a 1, b 1"):
        _train(model=str(tiny_encoder), data=str(rows), output=str(tmp_path / "run"), held_out=str(held_out))
