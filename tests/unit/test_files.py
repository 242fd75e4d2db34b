"""Writing: the old file or the new one is there at any time, never half of one, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from veneer import files
from veneer.errors import VeneerError
from veneer.files import TEMPORARY, atomic_file, atomic_folder, locked, remove_leftovers, write_text

pytestmark = pytest.mark.unit


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename from another disk would be a copy"
    assert path.read_text() == "new"
    write_text(str(path), "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert _names(path.parent) == ["file.txt"]


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_what_is_written_has_the_mode_of_the_umask(umask, file_mode, folder_mode, tmp_path):
    """safetensors writes for the owner alone, whatever the umask says."""
    old = os.umask(umask)
    try:
        write_text(tmp_path / "text", "new")
        with atomic_file(tmp_path / "tensors") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
        with atomic_folder(tmp_path / "folder") as folder:
            save_file({"a": torch.zeros(2)}, folder / "tensors")
            (folder / "inner").mkdir()
            (folder / "inner" / "private").touch(0o600)
    finally:
        os.umask(old)
    files = ("text", "tensors", "folder/tensors", "folder/inner/private")
    assert {name: (tmp_path / name).stat().st_mode & 0o777 for name in files} == dict.fromkeys(files, file_mode)
    folders = ("folder", "folder/inner")
    assert {name: (tmp_path / name).stat().st_mode & 0o777 for name in folders} == dict.fromkeys(folders, folder_mode)
    assert _names(tmp_path / "folder") == ["inner", "tensors"]


@pytest.mark.parametrize(
    "raised",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
        OSError("512 requested and 0 written"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
        "its own temporary file",
    ],
)
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_what_the_system_refuses_names_the_goal(atomic, raised, tmp_path):
    goal = tmp_path / "goal"
    with pytest.raises(OSError, match="No space left") as caught, atomic(goal) as temporary:
        raise OSError(28, "x", str(temporary / "part")) if isinstance(raised, str) else raised
    assert (caught.value.errno, caught.value.filename) == (28, str(goal))
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    "raised",
    [FileNotFoundError(2, "No such file", "another"), VeneerError("full (os error 28)"), ValueError("(os error 2)")],
)
def test_other_errors_pass_through(raised, tmp_path):
    with pytest.raises(type(raised)) as caught, atomic_file(tmp_path / "goal"):
        raise raised
    assert caught.value is raised


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text("half") / 0
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["file.txt"]


def test_a_folder_replaces_a_full_one(tmp_path):
    path = tmp_path / "folder"
    for content in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / content).write_text(content)
            if content == "new":
                assert _names(path / "inner") == ["old"]
    assert _names(path / "inner") == ["new"]
    assert _names(tmp_path) == ["folder"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(path) as temporary:
        (temporary / "half").write_text("half") / 0
    assert _names(path) == ["old"]
    assert _names(tmp_path) == ["folder"]


def test_all_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    flush, replace = files._flush, os.replace
    monkeypatch.setattr(files, "_flush", lambda path: (done.append(f"flush {path.name}"), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"rename to {b.name}"), replace(a, b)))
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "some")
    temporary = f"{TEMPORARY}some-"
    write_text(tmp_path / "file", "x")
    assert done == [f"flush {temporary}file", "rename to file", f"flush {tmp_path.name}"]
    done.clear()
    with atomic_folder(tmp_path / "folder") as made:
        (made / "inside").touch()
    assert done == [f"flush {name}" for name in ("inside", f"{temporary}folder")] + [
        "rename to folder", f"flush {tmp_path.name}",
    ]  # fmt: skip


def test_a_link_put_under_a_guessed_name_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / f"{TEMPORARY}{os.getpid()}-report.html").symlink_to(victim)
    write_text(tmp_path / "report.html", "x")
    assert (victim.read_text(), (tmp_path / "report.html").read_text()) == ("kept", "x")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / f"{TEMPORARY}guessed-report.html").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "report.html", "y")
    assert victim.read_text() == "kept"


_WRITE = """
import os, signal, sys
from veneer import files
left, path = int(sys.argv[1]), sys.argv[2]
def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
files._flush, os.replace, files.shutil.rmtree = map(counted, (files._flush, os.replace, files.shutil.rmtree))
with files.atomic_folder(path) as folder:
    for name in "ab":
        (folder / name).write_text("new")
"""


def test_killed_at_any_moment_the_old_folder_or_the_new_one_can_be_had(tmp_path):
    """Between two renames neither stands under its name: the old one is put back when leftovers are removed."""
    path, seen = tmp_path / "folder", []
    for moment in range(1, 20):
        path.mkdir(exist_ok=True)
        for name in "ab":
            (path / name).write_text("old")
        command = [sys.executable, "-c", _WRITE, str(moment), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        remove_leftovers(tmp_path)
        assert _names(tmp_path) == ["folder"]
        contents = {(path / name).read_text() for name in "ab"}
        assert len(contents) == 1, "never half of one"
        seen += contents
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.returncode == 0
    assert seen == sorted(seen, reverse=True), "old up to some moment, new from then on"
    assert seen.count("old") > 4
    assert seen.count("new") > 1


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / f"{TEMPORARY}1-file").touch()
    (tmp_path / f"{TEMPORARY}1-folder").mkdir()
    (tmp_path / f"{TEMPORARY}1-folder" / "inside").touch()
    (tmp_path / "kept").touch()
    (tmp_path / f"{TEMPORARY}old-1-kept").mkdir()  # whose write had come to its end
    remove_leftovers(tmp_path)
    assert _names(tmp_path) == ["kept"]


def test_leftovers_that_somebody_may_be_writing_still_stay(tmp_path):
    long_ago = time.time() - 100
    for number in (1, 2, 3):
        folder = tmp_path / f"{TEMPORARY}{number}-folder"
        folder.mkdir()
        (folder / "inside").touch()
        for path in (folder / "inside", folder)[: number - 1]:  # of 1 nothing is old, of 2 the file, of 3 all
            os.utime(path, (long_ago, long_ago))
    remove_leftovers(tmp_path, age=50)
    assert _names(tmp_path) == [f"{TEMPORARY}1-folder", f"{TEMPORARY}2-folder"]


_HOLDS = """
import sys
from pathlib import Path
from veneer.files import locked
with locked(Path(sys.argv[1]), wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_until_its_process_ends_however_that_is(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDS, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(folder, wait=False):
            pass
        process.send_signal(signal.SIGKILL)
        with locked(folder, wait=True):
            assert _names(folder) == [], "nothing is left in it"


def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch):
    def none(descriptor, how):
        raise OSError("no locks")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with locked(tmp_path, wait=False), locked(tmp_path, wait=False):
        pass
