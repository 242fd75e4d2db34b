"""JSON and YAML that anybody may have written, or damaged: whatever is wrong with it is a ValueError of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LONGEST = 300  # letters of what a library says


def parsed_json(text: str | bytes, **options: Any) -> Any:
    """What a JSON text says; ``options``: of ``json.loads``. Raises ValueError, for nesting that is too deep as well.

    Example:
        >>> from veneer.documents import parsed_json
        >>> parsed_json('{"step": 2}')
        {'step': 2}
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """What a JSON file says. Raises ValueError, and OSError where it cannot be opened."""
    return parsed_json(_text(path))


def read_yaml(path: Path) -> Any:
    """What a YAML file says, with plain values alone. Raises ValueError, and OSError where it cannot be opened."""
    return parsed_yaml(_text(path))


def parsed_yaml(text: str) -> Any:
    """What a YAML text says. Raises ValueError."""
    import yaml

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # of the library: dates, numbers and tags that are none raise what they happen to
        raise ValueError(" ".join(str(error).split())[:_LONGEST]) from None


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no regular file")
    return path.read_text(encoding="utf-8")
