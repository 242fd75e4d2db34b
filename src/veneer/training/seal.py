"""A digest of a checkpoint, by which a file that was changed, cut or exchanged since is noticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_PART = 2**20  # bytes read at once


def seal(folder: Path, fields: dict[str, Any], besides: str) -> str:
    """SHA-256 of ``fields``, JSON values, and of the names and bytes of all files in ``folder`` but ``besides``."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        if name != besides:
            digest.update(f"\n{name} {(folder / name).stat().st_size}\n".encode())
            with (folder / name).open("rb") as file:
                while part := file.read(_PART):
                    digest.update(part)
    return digest.hexdigest()
