"""How rows are read is kept with the run: evaluation, prediction and resuming read other files the same way."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter

import pytest
from rich.console import Console

import veneer
from tokens import tokenizer
from veneer.commands.generate import answers, with_asked_system
from veneer.data.columns import Reading
from veneer.data.memory import rows_of
from veneer.data.questions import to_questions
from veneer.errors import ConfigError, DataError
from veneer.generation.config import GenerateOptions
from veneer.runs.folder import RunFolder
from veneer.runs.opened import open_named
from veneer.runs.reading import kept_reading
from veneer.runs.rows import read_split
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _console():
    return Console(file=io.StringIO(), width=400)


def _rows(asked, answer, number=24):
    return [{asked: f"{a}{b}:", answer: " yes" if a < "g" else " no"} for a in "bcdfgklm" for b in "aeiou"][:number]


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    rows = _write(folder / "rows.jsonl", [*_rows("question", "answer"), {"question": "no answer"}])
    console = _console()
    veneer.train(
        str(tiny_folder), data=rows, columns={"prompt": "question", "completion": "answer"}, bad_rows="leave-out",
        output=folder / "run", steps=2, batch_size=4, rank=2, check_memory=False, console=console,
    )  # fmt: skip
    assert f"1 bad row left out:\n  1 × has no answer (its columns: question). ({rows}:25)" in console.file.getvalue()
    return folder / "run"


def test_columns_and_bad_rows_are_kept(run):
    assert RunFolder(run).rows()["columns"] == {"prompt": "question", "completion": "answer"}
    assert RunFolder(run).config().bad_rows == "leave-out"
    for source in (run, run / "adapter"):
        expected = Reading({"prompt": "question", "completion": "answer"}, "prompt/completion", asked=False)
        assert kept_reading(source) == expected
    assert veneer.resume(run, steps=2, console=_console()).steps == 2


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_other_rows_are_read_the_same_way(run, tmp_path, inside):
    rows = _write(tmp_path / "other.jsonl", _rows("question", "answer", 8))
    named = _write(tmp_path / "named.jsonl", _rows("prompt", "completion", 8))
    sides = [veneer.evaluate(run / inside, data=str(file), examples=0).adapter.loss for file in (rows, named)]
    assert sides[0] == sides[1], "a prompt, joined to its completion as it is"
    asked = [{"question": row["question"]} for row in _rows("question", "answer", 2)]
    both = [
        [dict(each.probabilities) for each in veneer.predict(run / inside, data=data, console=_console())]
        for data in (asked, [{"prompt": row["question"]} for row in asked])
    ]
    assert both[0] == both[1]


def test_what_is_said_of_other_rows_wins(run, tmp_path):
    rows = _write(tmp_path / "other.jsonl", [*_rows("q", "a", 8), {"q": "no answer"}])
    columns = {"prompt": "q", "completion": "a"}
    with pytest.raises(DataError, match=r"other.jsonl:9 has no a \(its columns: q\)"):
        veneer.evaluate(run, data=str(rows), columns=columns)
    assert veneer.evaluate(run, data=str(rows), columns=columns, bad_rows="leave-out", examples=0).rows == 8
    predicted = veneer.predict(run, data=str(rows), columns={"prompt": "q"}, console=_console())
    assert len(predicted) == 9


def test_a_prediction_leaves_out_bad_rows(run, tmp_path):
    console = _console()
    data = [{"question": "be:"}, {"other": 1}, {"question": "la:"}]
    predicted = veneer.predict(run, data=data, bad_rows="leave-out", output=tmp_path / "out.csv", console=console)
    assert [row["question"] for row in predicted.rows] == ["be:", "la:"]
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3
    assert "1 bad row left out:" in console.file.getvalue()
    with pytest.raises(DataError, match=r"^row 2 of the given rows has no question"):
        veneer.predict(run, data=data, console=console)


def test_inspect_lists_bad_rows(run, tmp_path, veneer_command):
    rows = _write(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}, {"question": "c"}])
    assert veneer_command("inspect", rows).out == (
        f"{rows}: 1 rows of the shape instruction/output\n"
        "Read as instruction/output: question → instruction, answer → output; --columns reads them otherwise.\n"
        "1 bad row stops a run, unless bad_rows: leave-out:\n"
        f"  1 × has no answer (its columns: question). ({rows}:2)\n"
        "Give --model M to see its tokens, and which of them are learned.\n"
    )
    as_prompts = veneer_command("inspect", rows, "--columns", "prompt=question,completion=answer", "--json")
    assert json.loads(as_prompts.out)["shape"] == "prompt/completion"


def _split_of(**options):
    config = TrainConfig(model="m", output="o", **options)
    rows = read_split(config, {})
    return rows, [example.where.rpartition("/")[2] for example in rows.held_out]


def test_several_files_are_split_first_and_then_learned_as_often_as_asked(tmp_path):
    talk = [{"conversations": [{"from": "human", "value": f"{w}?"}, {"from": "gpt", "value": w}]} for w in "abcdef"]
    first, second = _write(tmp_path / "a.jsonl", _rows("question", "answer", 10)), _write(tmp_path / "b.jsonl", talk)
    rows, held_out = _split_of(data={str(first): 1, str(second): 3}, held_out=4)
    assert rows.shape == "instruction/output and messages"
    counts = Counter(example.where.rpartition("/")[2] for example in rows.train)
    assert len(held_out) == 4
    assert not set(held_out) & counts.keys()
    assert {name: count for name, count in counts.items() if name[0] == "b"} == {
        f"b.jsonl:{n}": 3 for n in range(1, 7) if f"b.jsonl:{n}" not in held_out
    }
    assert sum(counts[f"a.jsonl:{n}"] for n in range(1, 11)) + sum(name[0] == "a" for name in held_out) == 10


def test_the_validation_files_of_a_folder_are_held_out(tmp_path):
    for name, rows in (("train", _rows("q", "a")), ("valid", _rows("q", "a", 3)), ("test", _rows("q", "a", 2))):
        _write(tmp_path / f"{name}.jsonl", rows)
    how = {"data": str(tmp_path), "columns": {"prompt": "q", "completion": "a"}}
    rows, held_out = _split_of(**how)
    assert (len(rows.train), held_out) == (24, ["valid.jsonl:1", "valid.jsonl:2", "valid.jsonl:3"])
    assert rows.notes[0].startswith(
        f"{tmp_path} has the splits test (test.jsonl), train (train.jsonl), validation (val"
    )
    assert len(_split_of(**how, held_out=0.25)[1]) == 6
    assert len(_split_of(**{**how, "data": str(tmp_path / "train.jsonl")})[1]) == 2


def test_a_second_file_of_rows_is_no_run_yaml(tmp_path, refused):
    rows = _write(tmp_path / "b.jsonl", [])
    message = refused("train", "--model", "m", "--data", "a.jsonl", rows)
    assert message == f"{rows} holds rows, and is no RUN.yaml; give it as rows: --data a.jsonl,{rows}"


ECHO = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_system_message_is_the_run_s_wherever_it_is_asked(tiny_folder, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    made = tokenizer(chat=ECHO)
    made.save_pretrained(folder)
    rows = [{"messages": [{"role": "user", "content": f"{w}?"}, {"role": "assistant", "content": w}]} for w in "abcdef"]
    own = {"messages": [{"role": "system", "content": "Own."}, *rows[0]["messages"]]}
    console, output = _console(), tmp_path / "run"
    veneer.train(
        str(folder), data=[*rows, own], system="Be brief.", output=output, held_out=0, steps=2, batch_size=4, rank=2,
        check_memory=False, console=console,
    )  # fmt: skip
    assert "1 row (row 7 of the given rows) with a system message of their own, which stays." in console.file.getvalue()
    for source in (output, output / "adapter"):
        opened = open_named(source)
        decoded = [opened.renderer.tokenizer.decode(ids) for ids in (
            opened.renderer.turn(({"role": "user", "content": "a?"},)),
            opened.renderer.prompt(to_questions(rows_of(rows[:1])).items[0]),
            opened.renderer.prompt(to_questions(rows_of([own])).items[0]),
        )]  # fmt: skip
        asked = "<|user|>a?<|end|><|assistant|>"
        assert decoded == [f"<|system|>Be brief.<|end|>{asked}"] * 2 + [f"<|system|>Own.<|end|>{asked}"]
        other = with_asked_system(opened, GenerateOptions(system=""))
        assert made.decode(other.renderer.turn(({"role": "user", "content": "a?"},))) == asked


def test_a_system_message_that_goes_nowhere_is_refused(run, rows_file):
    with pytest.raises(DataError, match=r"^system goes before conversations, and there is none among the rows \(.*:1"):
        _split_of(data=str(rows_file), system="Be brief.")
    assert _split_of(data=str(rows_file), system="Be brief.", template="chat")
    with pytest.raises(ConfigError, match="system goes into a chat template, and the question is asked without one"):
        answers(run, "be:", system="Be brief.")
    with pytest.raises(ConfigError, match="system goes into a chat template, and the rows are asked without one"):
        veneer.predict(run, data=[{"prompt": "be:"}], system="Be brief.", answer="text", console=_console())
