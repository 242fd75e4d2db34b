"""The files of veneer predict: what is written is read back, in order; standard input and output; refusals."""

from __future__ import annotations

import datetime
import errno
import json
from pathlib import Path

import pandas
import pytest

from veneer.data.read import Row, read_rows
from veneer.errors import DataError
from veneer.prediction import output as files
from veneer.prediction.output import Output, kept_columns
from veneer.prediction.result import Prediction

pytestmark = pytest.mark.unit

ROWS = [
    {"prompt": "bat:", "id": 7, "tags": ["a", 'b"c'], "note": "two\nlines, and ü"},
    {"prompt": "mat:", "id": 8, "tags": [], "note": None},
]
PREDICTIONS = [Prediction("yes", {"no": 0.25, "yes": 0.75}), Prediction("no", {"no": 0.625, "yes": 0.375})]
RECORDS = [{**row, **prediction.columns} for row, prediction in zip(ROWS, PREDICTIONS, strict=True)]


def _rows(rows):
    return [Row(fields, f"rows.jsonl:{number}") for number, fields in enumerate(rows, start=1)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".JSONL"])
def test_what_is_written_is_read_back(suffix, tmp_path):
    path = tmp_path / f"out{suffix}"
    Output(path, _rows(ROWS), ROWS).write(PREDICTIONS)
    wanted = RECORDS
    if suffix == ".csv":
        text = [
            {name: json.dumps(value) if name == "tags" else value for name, value in row.items()} for row in RECORDS
        ]
        wanted = [{name: "" if value is None else str(value) for name, value in row.items()} for row in text]
    assert [row.fields for row in read_rows(path)] == wanted
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_numbers_are_numbers_in_parquet(tmp_path):
    Output(tmp_path / "out.parquet", _rows(ROWS), ROWS).write(PREDICTIONS)
    frame = pandas.read_parquet(tmp_path / "out.parquet")
    assert frame["probability_yes"].sum() == 1.125
    assert frame["id"].dtype == "int64"


def test_no_column_but_the_predictions(tmp_path):
    for suffix in (".jsonl", ".csv", ".parquet"):
        path = tmp_path / f"out{suffix}"
        Output(path, _rows(ROWS), kept_columns(_rows(ROWS), [], ())).write([Prediction("a"), Prediction("b")])
        assert [row.fields for row in read_rows(path)] == [{"prediction": "a"}, {"prediction": "b"}]


def test_dates_are_text_and_what_is_not_finite_is_null(tmp_path):
    rows = [{"day": datetime.date(2024, 2, 3), "x": float("nan")}]
    Output(tmp_path / "out.jsonl", _rows(rows), rows).write([Prediction("a")])
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"day": "2024-02-03", "x": None, "prediction": "a"}
    with pytest.raises(DataError, match=r"^rows\.jsonl:1: b holds bytes, which is no text.* with --keep\.$"):
        Output(tmp_path / "out.csv", _rows([{"b": b"x"}]), [{"b": b"x"}])
    mixed = [{"id": 3}, {"id": "three"}]
    with pytest.raises(DataError, match=r"^The column id cannot be written to .*out\.parquet, as its values are of"):
        Output(tmp_path / "out.parquet", _rows(mixed), mixed)


def test_columns_to_keep():
    rows = _rows(ROWS)
    assert kept_columns(rows, ["id"], ()) == [{"id": 7}, {"id": 8}]
    with pytest.raises(
        DataError, match=r"^keep names 'idd', and the rows have no such column\. Did you mean 'id'\? They"
    ):
        kept_columns(rows, ["idd"], ())
    taken = _rows([{"prompt": "a", "prediction": "b"}])
    with pytest.raises(
        DataError, match=r"^The rows have a column prediction already, which the prediction adds; rename"
    ):
        kept_columns(taken, None, ())
    with pytest.raises(DataError, match="have a column probability_a already"):
        kept_columns(_rows([{"probability_a": 1}]), None, ("a", "b"))
    assert kept_columns(taken, ["prompt"], ()) == [{"prompt": "a"}]


def test_from_standard_input_to_standard_output(finished_run, veneer_command):
    lines = '{"prompt": "bat:", "id": 7}\n\n{"prompt": "mat:"}\n'
    done = veneer_command("predict", finished_run, "-", stdin=lines)
    assert done.code == 0
    first, second = map(json.loads, done.out.splitlines())
    assert list(first) == ["prompt", "id", "prediction", "probability_no", "probability_yes"]
    assert (first["prediction"], second["prediction"]) == ("yes", "no")
    assert "2/2 rows · " in done.err


def test_into_a_file(finished_run, veneer_command, tmp_path):
    data, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    data.write_text("prompt,id\nbat:,7\nmat:,8\n")
    done = veneer_command("predict", finished_run, data, "--output", out, "--keep", "id")
    assert (done.code, done.out) == (0, f"2 rows written to {out}.\n")
    assert [(row.fields["id"], row.fields["prediction"]) for row in read_rows(out)] == [("7", "yes"), ("8", "no")]


def test_refusals_are_one_sentence(finished_run, refused, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a"}\n{"id": 3}\n')
    assert refused("predict", finished_run, data) == f"{data}:2 has no prompt (its columns: id)."
    data.write_text("\n")
    assert refused("predict", finished_run, data) == f"{data} holds no rows."
    assert refused("predict", finished_run, "-") == "standard input holds no rows."
    assert refused("predict", finished_run, "-", stdin="{") == (
        "standard input:1 is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1). "
        "Each line of a .jsonl file is one object."
    )
    assert refused("predict", finished_run, tmp_path / "row.jsonl").startswith(
        f"There is no file {tmp_path}/row.jsonl."
    )
    data.write_text('{"prompt": "a"}\n')
    nowhere = tmp_path / "no" / "out.csv"
    assert refused("predict", finished_run, data, "--output", nowhere) == (
        f"The folder of the output {nowhere} does not exist; make it first: mkdir -p {nowhere.parent}"
    )
    folder = tmp_path / "x.csv"
    folder.mkdir()
    assert (
        refused("predict", finished_run, data, "--output", folder) == f"The output {folder} is a folder; name a file."
    )
    assert "ends in .json; it may end in .jsonl, .csv, .parquet. Did you mean '.jsonl'?" in refused(
        "predict", finished_run, data, "--output", tmp_path / "out.json"
    )


def test_a_full_disk_is_one_sentence_and_keeps_what_was_computed(finished_run, veneer_command, tmp_path, monkeypatch):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"prompt": "bat:"}\n')

    def full(file, records):
        raise OSError(errno.ENOSPC, "No space left on device", str(out))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_lines", full)
        done = veneer_command("predict", finished_run, data, "--output", out)
    assert (done.code, out.exists()) == (1, False)
    assert done.err.endswith(f"Error: {out}: No space left on device\n")
    assert Path(f"{out}.partial").exists()
    done = veneer_command("predict", finished_run, data, "--output", out)
    assert "1 row was predicted before the interruption, and kept." in done.err
    assert out.exists()
