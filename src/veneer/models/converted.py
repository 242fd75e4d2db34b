"""A GGUF file as a transformers folder, in the user's cache: of even a small GGUF file transformers reads the header
three times, for config, weights and tokenizer, and takes a quarter of a minute; for the folder a second."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import transformers

from veneer.files import atomic_folder, cache_folder, remove_leftovers

_KILLED = 3600  # seconds: a write that did nothing for so long was
_ROOM = 2  # times the weights' size must be free on the disk: a cache is no reason to fill it


def folder_of(file: Path) -> Path:
    """Where what was made of this very file by this version of transformers is kept, if it is."""
    about = file.stat()
    what = f"{file}, {about.st_size} bytes, {about.st_mtime_ns}, transformers {transformers.__version__}, fp32"
    return cache_folder() / "gguf" / f"{file.stem}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def keep(folder: Path, model: Any, tokenizer: Any) -> None:
    """Put a model in fp32 and its tokenizer there for the next time; where that cannot be written, it is not."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, age=_KILLED)
        if shutil.disk_usage(folder.parent).free < _ROOM * size:
            return
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:
        return
