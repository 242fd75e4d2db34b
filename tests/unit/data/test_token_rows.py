"""Rows on the disk are the rows that were put there, in a few bytes a token."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tracemalloc

import pytest

import veneer
from veneer.data import kept
from veneer.data.kept import Kept, Spool
from veneer.data.pairs import Pair, PairRows, borders_of, longest_sequence, sequences
from veneer.data.token_rows import IGNORE, TokenRows, Tokens, digest_of, label_lengths_of, lengths_of
from veneer.training.batches import Batches, by_length
from veneer.training.loss import tokens_gone_through

pytestmark = pytest.mark.unit


@pytest.fixture(params=["in memory", "in a file"])
def _memory(request, monkeypatch):
    if request.param == "in a file":
        monkeypatch.setattr(kept, "_IN_MEMORY", 64)


def _rows(count=50):
    draw = random.Random(0)
    rows = []
    for number in range(count):
        ids = [draw.randrange(200_000) for _ in range(draw.randrange(1, 20))]
        rows.append(Tokens(ids, [IGNORE, *ids[1:]], f"größe.jsonl:{number}"))
    return rows


@pytest.mark.usefixtures("_memory")
def test_the_rows_are_those_that_were_added():
    rows = _rows()
    made = TokenRows(rows)
    assert list(made) == rows
    assert (made[3], made[-1], made[2:5], len(made)) == (rows[3], rows[-1], rows[2:5], 50)
    assert lengths_of(made).tolist() == lengths_of(rows).tolist() == [len(row.ids) for row in rows]
    assert label_lengths_of(made).tolist() == label_lengths_of(rows).tolist()
    assert made.with_highest_token() == max(rows, key=lambda row: max(row.ids))
    with pytest.raises(IndexError):
        made[50]
    assert TokenRows().with_highest_token() is None


@pytest.mark.usefixtures("_memory")
def test_the_digest_is_that_of_the_rows_as_one_text():
    """Runs of before have it in their checkpoints."""
    rows, others = _rows(), _rows(3)
    text = json.dumps([(row.ids, row.labels) for row in rows + others])
    wanted = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert digest_of(TokenRows(rows), TokenRows(others)) == digest_of(rows, others) == wanted
    assert digest_of(rows) != digest_of(rows[:-1])


@pytest.mark.usefixtures("_memory")
def test_steps_have_the_same_rows_from_a_file_as_from_a_list():
    rows = _rows()
    from_list, from_file = Batches(rows, 4, 7), Batches(TokenRows(rows), 4, 7)
    for step in (0, 5, 12, 13, 25):
        assert from_list.rows(step) == from_file.rows(step)
        assert [len(row.ids) for row in from_file.lengths(step)] == [len(row.ids) for row in from_file.rows(step)]
    assert list(by_length(TokenRows(rows), 7)) == list(by_length(rows, 7))


def _pairs():
    rows = _rows()
    return [
        Pair.of(first, second, (None, False, True)[number % 3], 100 + number)
        for number, (first, second) in enumerate(zip(rows, rows[::-1], strict=True))
    ]


@pytest.mark.usefixtures("_memory")
def test_pairs_are_those_that_were_added(tmp_path):
    pairs = _pairs()
    made = PairRows(pairs)
    assert list(made) == pairs
    assert made[2:4] == pairs[2:4]
    assert borders_of(made).tolist() == borders_of(pairs).tolist() == [pair.border for pair in pairs]
    assert borders_of(TokenRows(_rows(3))).tolist() == borders_of(_rows(3)).tolist() == [0, 0, 0]
    assert longest_sequence(made) == max(len(side.ids) for pair in pairs for side in sequences(pair))
    text = json.dumps([(pair.ids, pair.labels, pair.border, pair.desirable) for pair in pairs])
    assert digest_of(made) == digest_of(pairs) == hashlib.sha256(text.encode()).hexdigest()[:16]
    with (tmp_path / "pairs").open("w+b") as file:
        made.write(file, "")
        file.seek(0)
        assert list(PairRows.read(file)[0]) == pairs


@pytest.mark.usefixtures("_memory")
def test_steps_count_both_sequences_of_a_pair():
    batches = Batches(PairRows(_pairs()), 4, 7)
    for step in (0, 5, 12):
        rows, lengths = batches.rows(step), batches.lengths(step)
        sides = [[len(side.ids) for side in sequences(row)] for row in rows]
        assert [[len(side.ids) for side in row.sequences()] for row in lengths] == sides
        for packed in (False, True):
            assert tokens_gone_through(lengths, "causal", packed) == tokens_gone_through(rows, "causal", packed)
        assert tokens_gone_through(rows, "causal", False) == 2 * len(rows) * max(map(max, sides))


def test_the_order_of_rows_stays_what_it_was():
    """A run that began before goes on over the same rows."""
    steps = Batches([Tokens([1] * (n % 5 + 1), [1], str(n)) for n in range(12)], 3, 0)
    assert [[int(row.where) for row in steps.rows(step)] for step in range(5)] == [
        [7, 2, 8], [1, 11, 6], [3, 9, 4], [0, 5, 10], [1, 6, 11]
    ]  # fmt: skip


def test_a_token_takes_eight_bytes_or_none():
    row = Tokens(list(range(1000, 1500)), list(range(1000, 1500)), "rows.jsonl:1")
    tracemalloc.start()
    made = TokenRows(row for _ in range(4000))  # two million tokens
    grown = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.nbytes == 4000 * (500 * 8 + 12 + 20)
    assert grown < 10e6, "of 16 MB, or 136 MB as lists"
    assert made[3999] == row


@pytest.mark.usefixtures("_memory")
def test_objects_are_kept_and_chosen():
    made = Kept({"a": [number, "é"]} for number in range(30))
    assert list(made) == [{"a": [number, "é"]} for number in range(30)]
    some = made.at([5, 3, 29]).at([2, 1])
    assert (len(some), list(some), some[-1]) == (2, [{"a": [29, "é"]}, {"a": [3, "é"]}], {"a": [3, "é"]})
    assert made[1:3] == [made[1], made[2]]


def test_a_disk_without_room_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "_IN_MEMORY", 8)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.tempfile, "TemporaryFile", full)
    with pytest.raises(veneer.VeneerError, match=r"^The rows are too many for the memory, .*: No space left on device"):
        Spool().add(b"more than eight")


def test_nothing_is_left_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "_IN_MEMORY", 64)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert TokenRows(_rows())[0] == _rows()[0]
    assert os.listdir(tmp_path / "veneer") == []
