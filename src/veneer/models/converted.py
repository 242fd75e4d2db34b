"""A GGUF file as a transformers folder, in the user's cache: of even a small GGUF file transformers reads the header
twice more for the tokenizer, and takes many seconds; for the folder one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import transformers

from veneer import __version__
from veneer.documents import read_json
from veneer.files import atomic_folder, cache_folder, remove_leftovers

_FORM = 3  # raised when the same file becomes another model than before, within a version, too
_SOURCE = "veneer-source.json"  # in each copy: of which file it is; when it was used last
_KILLED = 3600  # seconds: a write that did nothing for so long was
_UNUSED = 30 * 24 * 3600  # seconds: a copy that nobody has loaded for so long goes
_ROOM = 2  # times the weights' size must be free on the disk: a cache is no reason to fill it


def folder_of(file: Path) -> Path:
    """Where what was made of this very file by these versions of Veneer and transformers is kept, if it is."""
    versions = f"veneer {__version__} ({_FORM}), transformers {transformers.__version__}, fp32"
    what = f"{json.dumps(_state(file))}, {versions}"
    return cache_folder() / "gguf" / f"{file.stem}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def is_whole(folder: Path) -> bool:
    """Whether what was kept can be loaded: nothing of it is gone, cut, changed or a link, and only this user could have
    written there. What is not whole is made again."""
    try:
        said = read_json(folder / _SOURCE)
        return _only_ours(folder.parent) and _only_ours(folder) and said["copy"] == _files(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def used(folder: Path) -> None:
    """Say that a copy is loaded now."""
    try:
        os.utime(folder / _SOURCE)
    except OSError:  # a cache that others own
        return


def keep(folder: Path, file: Path, model: Any, tokenizer: Any) -> None:
    """Put the model of ``file`` in fp32 and its tokenizer there for the next time; where that cannot be written, it is
    not. Copies of files that have changed or are gone, and those not used for a month, are deleted."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.parent.chmod(0o700)  # a user who may write there may exchange a model
        if not _only_ours(folder.parent):
            return
        if folder.is_symlink():
            folder.unlink()
        remove_leftovers(folder.parent, age=_KILLED)
        _prune(folder.parent)
        if shutil.disk_usage(folder.parent).free < _ROOM * size:
            return
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            said = {"file": _state(file), "copy": _files(temporary)}
            (temporary / _SOURCE).write_text(json.dumps(said), encoding="utf-8")
        folder.chmod(0o700)
    except OSError:
        return


def _prune(cache: Path) -> None:
    for copy in cache.iterdir():
        if copy.is_dir() and not copy.name.startswith(".") and not _may_be_used(copy / _SOURCE):
            shutil.rmtree(copy, ignore_errors=True)


def _may_be_used(source: Path) -> bool:
    """Not where it says nothing, as copies of the first version do, which had lost a part of what the file says."""
    try:
        said = read_json(source)
        is_used = time.time() - source.stat().st_mtime < _UNUSED
        return is_used and bool(_state(Path(said["file"][0])) == said["file"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _state(file: Path) -> list[Any]:
    about = file.stat()
    return [str(file), about.st_size, about.st_mtime_ns]


def _files(folder: Path) -> dict[str, list[int]]:
    """Path below ``folder`` → size and time of the last change; a link or a device is none of its files."""
    found = {}
    for file in folder.rglob("*"):
        about = file.lstat()
        if stat.S_ISREG(about.st_mode) and file != folder / _SOURCE:
            found[file.relative_to(folder).as_posix()] = [about.st_size, about.st_mtime_ns]
    return found


def _only_ours(folder: Path) -> bool:
    """Whether it is a folder of this user's, into which no other user may write; no link to one."""
    about = folder.lstat()
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022
