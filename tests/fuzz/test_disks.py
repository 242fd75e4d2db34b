"""A full disk for some of the verbs that write, others than `make disks` has; and that it finds what is bad."""

from __future__ import annotations

import errno

import pytest

from fuzz import disks
from fuzz.disks import Verb
from veneer.errors import ModelError
from veneer.files import TEMPORARY, atomic_file

pytestmark = pytest.mark.unit


@pytest.fixture
def disk(tmp_path):
    try:
        with disks.mounted(tmp_path / "a disk") as folder:
            yield folder
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("disk")  # skipped where none can be mounted
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path):
    names = ["train a whole model", "merge to nf4", "merge to GGUF", "export", "predict to JSON lines"]
    found = disks.outcomes(names, 1, tmp_path, seed=1)
    results = [(name, *case) for name, cases in found.items() for case in cases]
    assert [(name, result) for name, result, _ in results] == [(name, "right") for name in names], results


def _writes(content=b"x" * 20_000, *, name="out", first=None):
    def write(room, out):
        if first is not None:
            first(out)
        with atomic_file(out.with_name(name)) as temporary:
            temporary.write_bytes(content)

    return write


def _fails(out):
    raise KeyError("a traceback")


def _says_nothing(out):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("write", "result"),
    [
        (_writes(), "right"),
        (_writes(b"x"), "fits"),
        (_writes(first=_fails), "traceback"),
        (_writes(first=_says_nothing), "no sentence"),
        (_writes(first=lambda out: out.with_name("before.txt").write_text("")), "lost"),
        (_writes(first=lambda out: out.with_name(f"{TEMPORARY}1").touch()), "left behind"),
        (_writes(first=lambda out: out.with_name("half").touch()), "left behind"),
        (_writes(b"y" * 20_000), "other bytes"),
    ],
)
def test_what_is_bad_is_found(write, result, disk):
    out = disk / "out"
    out.write_bytes(b"x" * 20_000)
    expected = disks.digest(out)
    assert disks.outcome(Verb("out", write), disk, disk, 8192, expected)[0] == result


def test_what_cannot_be_written_again_is_found(disk):
    tries = []

    def write(room, out):
        tries.append(out)
        if len(tries) > 1:
            raise ModelError("it is there already")
        _writes()(room, out)

    assert disks.outcome(Verb("out", write), disk, disk, 8192, "")[0] == "not again"
