"""Several sources of rows in one name, and how often the rows of each are learned."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from veneer.data.formats import Example
from veneer.data.sources import Source, named_sources, sources_of, weighted
from veneer.errors import DataError
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit


def test_sources_have_names_and_numbers():
    assert sources_of("a.jsonl, b:test=2,c/d=0.5") == [Source("a.jsonl"), Source("b:test", 2.0), Source("c/d", 0.5)]
    for text in ("a.jsonl,b.jsonl=2", "rows.jsonl"):
        assert ",".join(map(str, sources_of(text))) == text


def test_a_file_whose_name_has_a_comma_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a,b=2.jsonl").touch()
    Path("c=2.jsonl").touch()
    assert sources_of("a,b=2.jsonl") == [Source("a,b=2.jsonl")]
    assert sources_of("c=2.jsonl,d.jsonl") == [Source("c=2.jsonl"), Source("d.jsonl")]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.jsonl,", r"^'' of 'a.jsonl,' names no source"),
        ("a.jsonl=0", "or rows that are learned no times"),
        ("a.jsonl=twice", r"^'a.jsonl=twice' of .* is no source=number, how often its rows are learned"),
    ],
)
def test_what_names_no_source_is_refused(text, match):
    with pytest.raises(DataError, match=match):
        sources_of(text)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (["a.jsonl", Path("b.jsonl")], "a.jsonl,b.jsonl"),
        ({"a.jsonl": 1, "b.jsonl": 0.5}, "a.jsonl,b.jsonl=0.5"),
        (Path("a.jsonl"), "a.jsonl"),
    ],
)
def test_a_list_and_a_mapping_are_one_name(data, text):
    assert TrainConfig(model="m", output="o", data=data).data == text
    assert named_sources(rows := [{"prompt": "a"}]) is rows


def test_rows_are_learned_as_often_as_their_source_says():
    times = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.5}
    examples = [Example(f"{name}:{number}", times=times[name]) for name in times for number in range(400)]
    counts = Counter(example.where for example in weighted(examples, 0))
    of = {name: [counts[f"{name}:{number}"] for number in range(400)] for name in "abcd"}
    assert (set(of["a"]), set(of["b"]), set(of["c"]), set(of["d"])) == ({1}, {2}, {0, 1}, {1, 2})
    assert abs(sum(of["c"]) - 200) < 40 > abs(sum(of["d"]) - 600)
    again, other = weighted(examples, 0), weighted(examples, 1)
    assert again == weighted(examples, 0) != other
