"""Reading rows: every format gives the same rows, and a bad one is named by file and line."""

from __future__ import annotations

import csv
import gzip
import json

import datasets
import huggingface_hub
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.folders import own_validation, splits_read
from veneer.data.read import read_rows, set_validation
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
        ("d.json", b'[{"text": ' + b"1" * 5000 + b"}]", r"d.json is not JSON that can be read: Exceeds the limit"),
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


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.json"])
def test_compressed_files_give_the_same_rows(tmp_path, name, suffix):
    plain = _write(tmp_path / name, ROWS)
    packed = tmp_path / f"{name}{suffix}"
    codec = {".gz": "gzip", ".zst": "zstd"}[suffix]
    with pyarrow.output_stream(str(packed), compression=codec) as out:
        out.write(plain.read_bytes())
    assert [row.fields for row in read_rows(packed)] == ROWS
    assert read_rows(packed)[0].where.startswith(f"{packed}")
    packed.write_bytes(b"no such thing")
    with pytest.raises(DataError, match=rf"{name}{suffix} cannot be unpacked"):
        read_rows(packed)


def test_ndjson_and_tables_of_other_separators(tmp_path):
    _write(tmp_path / "d.jsonl", ROWS).rename(tmp_path / "d.ndjson")
    assert [row.fields for row in read_rows(tmp_path / "d.ndjson")] == ROWS
    for name, text in (("a.csv", "prompt;n\nb, c;1,5\n"), ("b.csv", "prompt\tn\nb, c\t1,5\n")):
        (tmp_path / name).write_text(text)
        assert [row.fields for row in read_rows(tmp_path / name)] == [{"prompt": "b, c", "n": "1,5"}]
    (tmp_path / "one.csv").write_text("text\na\n")
    assert [row.fields for row in read_rows(tmp_path / "one.csv")] == [{"text": "a"}]


def test_a_text_is_a_row_and_a_folder_of_texts_its_files(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    assert [(row.fields, row.where) for row in read_rows(tmp_path / "a.txt")] == [
        ({"text": "One.\n\nTwo.\n"}, f"{tmp_path / 'a.txt'}")
    ]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "test.md").write_text("# Three")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "README.md").write_text("about the texts")
    assert [row.fields["text"] for row in read_rows(tmp_path)] == ["One.\n\nTwo.\n", "# Three"]
    _write(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(DataError, match=r"holds rows \(d.jsonl\) and texts \(a.txt\); name the files that are meant"):
        read_rows(tmp_path)


def test_the_files_of_a_folder_by_split(tmp_path):
    for name, count in (("train-0.jsonl", 2), ("train-1.jsonl.gz", 0), ("valid.jsonl", 1), ("test.csv", 1)):
        if count:
            _write(tmp_path / name, ROWS[:count])
        else:
            (tmp_path / name).write_bytes(gzip.compress(json.dumps(ROWS[1]).encode()))
    assert [row.where.rpartition("/")[2] for row in read_rows(tmp_path)] == [
        "train-0.jsonl:1", "train-0.jsonl:2", "train-1.jsonl.gz:1",
    ]  # fmt: skip
    assert [len(read_rows(f"{tmp_path}:{split}")) for split in ("valid", "validation", "dev", "test")] == [1, 1, 1, 1]
    assert own_validation(str(tmp_path)) == f"{tmp_path}:validation"
    assert own_validation(f"{tmp_path}:test") is None
    assert splits_read(str(tmp_path)) == (
        f"{tmp_path} has the splits test (test.csv), train (2 files), validation (valid.jsonl), of which train is "
        f"read; {tmp_path}:validation names another."
    )
    assert splits_read(f"{tmp_path}:test") == splits_read(str(tmp_path / "valid.jsonl")) == ""
    with pytest.raises(DataError, match=r"has no split 'tests'; it has test, train, validation. Did you mean 'test'\?"):
        read_rows(f"{tmp_path}:tests")


def test_a_folder_that_describes_its_configurations(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    _write(folder / "easy.jsonl", ROWS[:1])
    _write(folder / "hard.jsonl", ROWS)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy.jsonl\n- config_name: hard\n  data_files:\n"
        "  - split: test\n    path: hard.jsonl\n---\n"
    )
    assert len(read_rows(f"{folder}:easy")) == len(read_rows(f"{folder}:easy:train")) == 1
    assert len(read_rows(f"{folder}:hard:test")) == 2
    for name, match in (
        ("", r"has several configurations, easy, hard; name one as .*set:easy\.$"),
        (":test", r"name one as .*set:easy:test\.$"),
        (":esy:train", r"has no configuration 'esy'; it has easy, hard. Did you mean 'easy'\?$"),
        (":a:b:c", r"has too many parts; a data set is named as name:config:split"),
    ):
        with pytest.raises(DataError, match=match):
            read_rows(f"{folder}{name}")


def test_parquet_of_datasets_has_its_classes_by_name(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, None]}, features=features)
    data.to_parquet(str(tmp_path / "d.parquet"))
    assert [row.fields["label"] for row in read_rows(tmp_path / "d.parquet")] == ["pos", None, None]


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


def test_a_table_of_long_fields_leaves_the_limit_of_csv_as_it_was(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "long.csv").write_text(f"prompt,completion\n{'x' * 200_000},y\n")
    assert len(read_rows(tmp_path / "long.csv")[0].fields["prompt"]) == 200_000
    assert csv.field_size_limit() == before


def test_the_validation_split_that_a_data_set_brings(tmp_path, monkeypatch):
    data = datasets.Dataset.from_list(ROWS)
    for held_out in ("validation", "dev"):
        both = datasets.DatasetDict({"train": data, held_out: datasets.Dataset.from_list(ROWS[:1])})
        both.save_to_disk(tmp_path / held_out)
        assert set_validation(str(tmp_path / held_out)) == f"{tmp_path / held_out}:{held_out}"
        assert set_validation(f"{tmp_path / held_out}:train") == f"{tmp_path / held_out}:{held_out}"
        assert set_validation(f"{tmp_path / held_out}:{held_out}") is None
        assert len(read_rows(str(set_validation(str(tmp_path / held_out))))) == 1
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "test")
    data.save_to_disk(tmp_path / "one")
    files = tmp_path / "files"
    files.mkdir()
    _write(files / "train.jsonl", ROWS)
    _write(files / "valid.jsonl", ROWS)
    for source in (tmp_path / "test", tmp_path / "one", files, files / "train.jsonl", "bbc-topics", "none.jsonl"):
        assert set_validation(str(source)) is None


def test_of_a_configuration_the_validation_split_is_that_configurations(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a", "b", "c", "d"):
        _write(folder / f"{name}.jsonl", ROWS)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "  - split: validation\n    path: b.jsonl\n- config_name: hard\n  data_files:\n"
        "  - split: train\n    path: c.jsonl\n  - split: test\n    path: d.jsonl\n---\n"
    )
    assert set_validation(f"{folder}:easy") == f"{folder}:easy:validation"
    assert set_validation(f"{folder}:easy:train") == f"{folder}:easy:validation"
    assert set_validation(f"{folder}:easy:validation") is None
    assert set_validation(f"{folder}:hard") is None
