"""A few damaged files of each kind, other ones than `make fuzz` begins with; and what the fuzzing itself promises."""

from __future__ import annotations

import random

import pytest

from fuzz.fuzz import BAD, Reader, base_of, fuzz, outcome
from fuzz.kinds import KINDS, Kind
from fuzz.mutations import BYTES, mutations_of

pytestmark = pytest.mark.unit


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def reader():
    reader = Reader()
    yield reader
    reader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused_in_a_sentence(kind, bases, reader):
    outcomes = fuzz(15, [kind], bases, reader, first=1_000_000)[kind]
    assert [case for case in outcomes if case[1] in BAD] == []
    assert any(result == "refused" for _, result, _ in outcomes), "else nothing is damaged"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_damaged_is_read(kind, bases, tmp_path, monkeypatch):
    monkeypatch.setattr("fuzz.fuzz.damaged", lambda kind, number, base, copy: _copied(base, copy))
    assert outcome(kind, 0, base_of(kind, bases), tmp_path)[0] == "read"


def _copied(base, copy):
    import shutil

    shutil.copytree(base, copy)
    return "nothing"


@pytest.mark.parametrize(
    ("raised", "result"), [(KeyError("x"), "traceback"), (AssertionError("x"), "wrong"), (MemoryError(), "memory")]
)
def test_what_is_bad_is_found(raised, result, tmp_path, monkeypatch):
    def read(folder):
        raise raised

    monkeypatch.setitem(KINDS, "bad", Kind(lambda folder: None, ("*.json",), read))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.json").write_text("{}")
    assert outcome("bad", 0, tmp_path / "base", tmp_path)[0] == result


def test_every_mutation_ends_with_bytes_and_is_the_same_again(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n" * 50)
    for mutation in (*BYTES, *mutations_of(tmp_path / "a.txt")):
        for seed in range(20):
            once, again = (mutation((tmp_path / "a.txt").read_bytes(), random.Random(seed)) for _ in range(2))
            assert isinstance(once, bytes)
            assert once == again
