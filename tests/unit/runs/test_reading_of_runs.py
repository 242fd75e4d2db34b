"""How rows are read is kept with the run: evaluation, prediction and resuming read other files the same way."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

import veneer
from veneer.data.columns import Reading
from veneer.errors import DataError
from veneer.runs.folder import RunFolder
from veneer.runs.reading import kept_reading

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
    answers = veneer.predict(run, data=str(rows), columns={"prompt": "q"}, console=_console())
    assert len(answers) == 9


def test_a_prediction_leaves_out_bad_rows(run, tmp_path):
    console = _console()
    data = [{"question": "be:"}, {"other": 1}, {"question": "la:"}]
    answers = veneer.predict(run, data=data, bad_rows="leave-out", output=tmp_path / "out.csv", console=console)
    assert [row["question"] for row in answers.rows] == ["be:", "la:"]
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
