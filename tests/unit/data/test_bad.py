"""Bad rows: the first is an error that says how many there are, or all are left out, by reason and place."""

from __future__ import annotations

import json

import pytest

from veneer.data.bad import BadRows
from veneer.data.columns import Reading
from veneer.data.formats import to_examples
from veneer.data.memory import rows_of, write_rows
from veneer.data.read import Row, read_rows
from veneer.errors import DataError

pytestmark = pytest.mark.unit

LINES = [
    b'{"prompt": "a", "completion": "b"}', b'{"prompt": "c"}', b"{", b'{"prompt": "d", "completion": "e"}',
    b'{"prompt": "\\ud83d", "completion": "f"}', b'{"prompt": "\xff", "completion": "g"}', b"[1]", b'{"prompt": "h"}',
]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join(LINES))
    return path


def _read(path, bad):
    return to_examples(read_rows(path, bad), Reading(), bad)


def test_all_bad_rows_are_found_with_their_places(file):
    bad = BadRows()
    assert [example.where for example in _read(file, bad).items] == [f"{file}:1", f"{file}:4"]
    assert [row.where.rpartition(":")[2] for row in bad.rows] == ["3", "6", "7", "2", "5", "8"]
    assert bad.lines()[0] == f"  2 × has no completion (its columns: prompt). ({file}:2, {file}:8)"
    assert len(bad.lines()) == 5
    half = "  1 × prompt has '\\ud83d' as its character 1, half of a surrogate pair, which is no character"
    assert any(line.startswith(half) for line in bad.lines())
    assert bad.sentences()[0] == "6 bad rows left out:"
    assert bad.as_json()["count"] == 6
    with pytest.raises(
        DataError, match=r"d.jsonl:3 is not JSON: .* 5 more rows are bad: veneer inspect lists them, bad_"
    ):
        bad.refuse()


def test_the_first_one_is_an_error_where_none_is_left_out(file):
    with pytest.raises(DataError, match=r"d.jsonl:3 is not JSON: .* 2 more rows are bad"):
        read_rows(file)


def test_a_bad_first_row_does_not_decide_the_shape(tmp_path):
    rows = [Row({"id": 1}, "d:1"), *(Row({"prompt": "a", "completion": "b"}, f"d:{n}") for n in (2, 3))]
    bad = BadRows()
    assert len(to_examples(rows, Reading(), bad).items) == 2
    assert [row.reason for row in bad.rows] == ["has no prompt and no completion (its columns: id)."]


def test_where_all_are_bad_it_is_an_error(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("{\n{\n")
    with pytest.raises(DataError, match=r"d.jsonl:1 is not JSON: .* 1 more row is bad"):
        read_rows(path, BadRows())


def test_many_bad_rows_are_a_short_list():
    bad = BadRows()
    for number in range(1000):
        bad.add(f"d:{number}", f"d:{number} has {number % 2} legs and is a {'abcdefghijklmnop'[number % 16]}.")
    assert len(bad.lines()) == 11
    assert bad.lines()[-1] == "  … and 6 more reasons"
    assert bad.lines()[0].count("d:") == 10


def test_half_a_surrogate_pair_in_memory_is_written_and_left_out_when_read(tmp_path):
    rows = rows_of([{"prompt": "a", "completion": "b"}, {"prompt": "c\ud83d", "completion": "d"}])
    write_rows(rows, tmp_path / "d.jsonl")
    assert json.loads((tmp_path / "d.jsonl").read_text().splitlines()[1])["prompt"] == "c\ud83d"
    bad = BadRows()
    assert len(_read(tmp_path / "d.jsonl", bad).items) == len(bad) == 1
    with pytest.raises(DataError, match=r"^row 2 of the given rows: prompt has '.ud83d' as its character 2"):
        to_examples(rows)
