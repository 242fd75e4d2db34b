"""Reading rows: every format gives the same rows, and a bad one is named by file and line."""

from __future__ import annotations

import csv
import json

import datasets
import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.read import read_rows
from veneer.errors import DataError

pytestmark = pytest.mark.unit

ROWS = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": 'say "a,\nb"', "completion": " é"}]


def _write(path, rows):
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    rows = read_rows(_write(tmp_path / name, ROWS))
    assert [row.fields for row in rows] == ROWS


def test_where_a_row_stands(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row.where for row in read_rows(path)] == [f"{path}:1", f"{path}:3"]
    path = _write(tmp_path / "d.csv", [*ROWS, ROWS[0]])
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:3", f"{path}:5"]


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.text(), min_size=1), min_size=1))
def test_any_text_survives_jsonl(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "d.jsonl"
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=True).encode() + b"\n" for row in rows))
    assert [row.fields for row in read_rows(path)] == rows


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("d.jsonl", b'{"a": 1}\n{"a": \n', r"d.jsonl:2 is not JSON: .*one object"),
        ("d.jsonl", b'{"a": 1}\n[1]\n', r"d.jsonl:2 holds a list, not an object"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"d.jsonl:2 is not UTF-8 text"),
        ("d.jsonl", b"\n", r"d.jsonl holds no rows"),
        ("d.json", b'{"a": 1}', r"holds a JSON dict; a data file holds a list"),
        ("d.json", b'[\n{"a" 1}]', r"d.json:2 is not JSON"),
        ("d.jsonl", b"[" * 100_000, r"d.jsonl:1 is not JSON: maximum recursion depth"),
        ("d.json", b"[" * 100_000, r"d.json is not JSON that can be read: maximum recursion depth"),
        ("d.csv", b"a,b\n1,2\n1,2,3\n", r"d.csv:3 has 3 values, but the header names 2 columns; put quotes"),
        ("d.csv", b"a,b,a\n1,2,3\n", r"d.csv:1 names the column a twice; which one is meant"),
        ("d.csv", b'a,b\n1,"2\n', r"d.csv:2 cannot be read"),
        ("d.parquet", b"PAR1", r"cannot be read as Parquet"),
        ("d.xlsx", b"PK", r"ends in .xlsx; data files end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, .md"),
    ],
)
def test_bad_files(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        read_rows(path)


def test_a_missing_file_names_the_nearest(tmp_path):
    _write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"There is no file .*tran.jsonl. Did you mean '.*train.jsonl'\?"):
        read_rows(tmp_path / "tran.jsonl")


def test_a_name_that_is_nothing(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'no-such-set' is no file here .*not bbc-topics. HF_HUB_OFFLINE is set"):
        read_rows("no-such-set")


def test_a_folder_that_datasets_cannot_read(tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="datasets could not load"):
        read_rows(tmp_path)


def test_datasets_folders_and_splits(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    assert [row.fields for row in read_rows(tmp_path / "one")] == ROWS
    both = datasets.DatasetDict({"train": data, "test": datasets.Dataset.from_list(ROWS[:1])})
    both.save_to_disk(tmp_path / "both")
    assert len(read_rows(tmp_path / "both")) == 2
    (row,) = read_rows(f"{tmp_path / 'both'}:test")
    assert row.where.endswith("both:test row 1")
    with pytest.raises(DataError, match=r"has no split 'tst'; it has train, test"):
        read_rows(f"{tmp_path / 'both'}:tst")
    with pytest.raises(DataError, match="single data set without splits"):
        read_rows(f"{tmp_path / 'one'}:test")


def test_classes_come_by_their_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_dict({"text": list("abcd"), "label": [1, 0, -1, None]}, features=features).save_to_disk(
        tmp_path / "d"
    )
    assert [row.fields["label"] for row in read_rows(tmp_path / "d")] == ["pos", "neg", None, None]


def test_a_folder_of_data_files(tmp_path, monkeypatch):
    folder = tmp_path / "files"
    folder.mkdir()
    _write(folder / "train.jsonl", ROWS)
    _write(folder / "test.jsonl", ROWS[:1])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert [row.fields for row in read_rows(folder)] == ROWS
    assert len(read_rows(f"{folder}:test")) == 1
