"""What was measured of this machine once, in JSON files of the user's cache folder. No torch here."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.documents import read_json
from veneer.environment import processor
from veneer.files import cache_folder, write_text


def machine_key(torch_version: str, threads: int) -> str:
    """What a measurement holds for: this processor, this torch, so many threads."""
    return f"{processor()}, torch {torch_version}, {threads} threads"


def recall(name: str, key: str) -> Any:
    """The value that was remembered under ``key`` in the file ``name``; None where there is none, or no such file."""
    return _all(cache_folder() / name).get(key)


def remember(name: str, key: str, value: Any) -> None:
    """Put ``value`` beside the others; a file that cannot be written is no error."""
    remember_all(name, {key: value})


def remember_all(name: str, values: dict[str, Any]) -> None:
    """Put ``values``, by their keys, beside the others, as `remember` does."""
    path = cache_folder() / name
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**_all(path), **values}, indent=2) + "\n")


def _all(path: Path) -> dict[str, Any]:
    try:
        known = read_json(path)
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
