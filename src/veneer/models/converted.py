"""A GGUF file as a transformers folder, in the user's cache: of even a small GGUF file transformers reads the header
twice more for the tokenizer, and takes many seconds; for the folder one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import transformers

from veneer import __version__
from veneer.documents import read_json
from veneer.files import atomic_folder, cache_folder, remove_leftovers

_FORM = 2  # raised when the same file becomes another model than before, within a version, too
_SOURCE = "veneer-source.json"  # in each copy: of which file it is; when it was used last
_KILLED = 3600  # seconds: a write that did nothing for so long was
_UNUSED = 30 * 24 * 3600  # seconds: a copy that nobody has loaded for so long goes
_ROOM = 2  # times the weights' size must be free on the disk: a cache is no reason to fill it


def folder_of(file: Path) -> Path:
    """Where what was made of this very file by these versions of Veneer and transformers is kept, if it is."""
    versions = f"veneer {__version__} ({_FORM}), transformers {transformers.__version__}, fp32"
    what = f"{json.dumps(_state(file))}, {versions}"
    return cache_folder() / "gguf" / f"{file.stem}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"


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
        remove_leftovers(folder.parent, age=_KILLED)
        _prune(folder.parent)
        if shutil.disk_usage(folder.parent).free < _ROOM * size:
            return
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / _SOURCE).write_text(json.dumps(_state(file)), encoding="utf-8")
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
        return time.time() - source.stat().st_mtime < _UNUSED and bool(_state(Path(said[0])) == said)
    except (OSError, ValueError, IndexError, TypeError):
        return False


def _state(file: Path) -> list[Any]:
    about = file.stat()
    return [str(file), about.st_size, about.st_mtime_ns]
