"""Tokens are made once: the second time they come from the file, unless anything that they depend on has changed."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest

from tokens import CHAT, tokenizer
from veneer.data import kept
from veneer.data.formats import Example
from veneer.data.kept import Kept
from veneer.data.labels import Renderer
from veneer.data.pairs import to_judged, to_pairs
from veneer.data.token_cache import kept_pairs, kept_tokens

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_IN_MEMORY", 256)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "veneer" / "tokens"


def _examples(more=""):
    return Kept(
        Example(f"rows.jsonl:{n}", prompt=f"question {n}", answer=f"answer {n}{more}" * (n % 3)) for n in range(30)
    )


def _read(renderer, examples):
    """The rows and report, and how many examples were tokenised for them."""
    done = []
    rows, report = kept_tokens(renderer, examples, lambda items: (done.append(item) or item for item in items))
    return list(rows), report, len(done)


def test_tokens_are_made_once(folder):
    renderer = Renderer(tokenizer())
    rows, report, done = _read(renderer, _examples())
    assert (done, len(rows), len(report.left_out)) == (30, 20, 10)
    assert list(renderer.all(_examples())[0]) == rows
    assert _read(Renderer(tokenizer()), _examples()) == (rows, report, 0)
    assert [path.suffix for path in folder.iterdir()] == [""]
    assert _read(renderer, _examples().at(range(0, 30, 2)))[2] == 15


def _pairs(more=""):
    return Kept(
        Example(
            f"d:{n}",
            prompt=f"question {n}",
            answer=f"good {n}",
            rejected=Example(f"d:{n}", prompt=f"question {n}", answer=f"bad {n}{more}"),
        )
        for n in range(30)
    )


def _read_pairs(examples, **options):
    done = []
    rows, report = kept_pairs(
        Renderer(tokenizer()), examples, watched=lambda items: (done.append(item) or item for item in items), **options
    )
    return list(rows), report, len(done)


def test_tokens_of_pairs_and_judged_answers_are_made_once(folder):
    for judged, make in ((False, to_pairs), (True, to_judged)):
        rows, report, done = _read_pairs(_pairs(), judged=judged)
        assert done == 30
        assert rows == list(make(Renderer(tokenizer()), _pairs())[0])
        assert _read_pairs(_pairs(), judged=judged) == (rows, report, 0)
    assert len({*folder.iterdir()}) == 2
    # Their numbers are those of their references; another rejected answer is another row.
    assert _read_pairs(_pairs(), first=3)[0][0].number == 3
    assert _read_pairs(_pairs("!"))[2] == 30


@pytest.mark.parametrize(
    "other",
    [
        lambda renderer: (replace(renderer, max_length=20), _examples()),
        lambda renderer: (replace(renderer, learn="all"), _examples()),
        lambda renderer: (replace(renderer, arguments={"thinking": True}), _examples()),
        lambda renderer: (renderer, _examples("!")),
        lambda renderer: (Renderer(tokenizer(merges=(("a", "n"),))), _examples()),
        lambda renderer: (Renderer(tokenizer(chat=CHAT + " ")), _examples()),
    ],
)
def test_tokens_are_made_again_where_anything_else_is_asked(other, folder):
    renderer = Renderer(tokenizer())
    _read(renderer, _examples())
    assert _read(*other(renderer))[2] == 30


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda content: content.replace(b"ro", b"or"), lambda content: b""]
)
def test_a_file_that_is_not_whole_is_made_again(damage, folder):
    renderer = Renderer(tokenizer())
    rows, report, _ = _read(renderer, _examples())
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert _read(renderer, _examples()) == (rows, report, 30)
    assert _read(renderer, _examples()) == (rows, report, 0)


def test_rows_stay_readable_when_another_run_deletes_the_file(folder):
    renderer = Renderer(tokenizer())
    rows, _ = kept_tokens(renderer, _examples())
    for file in folder.iterdir():
        file.unlink()
    assert list(rows) == list(renderer.all(_examples())[0])


def test_tokens_that_nobody_used_for_a_month_go(folder):
    renderer = Renderer(tokenizer())
    _read(renderer, _examples())
    (old,) = folder.iterdir()
    os.utime(old, (0, time.time() - 31 * 24 * 3600))
    _read(renderer, _examples("!"))
    assert old not in folder.iterdir()


def test_a_folder_that_cannot_be_written_to_is_no_error(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("a file in its place")
    assert _read(Renderer(tokenizer()), _examples())[2] == 30


def test_few_rows_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(kept, "_IN_MEMORY", 2**20)
    assert _read(Renderer(tokenizer()), _examples())[2] == 30
    assert not folder.exists()
