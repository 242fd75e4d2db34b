"""Regular expressions over module names: Python's syntax, and no expression that runs for ever.

An adapter's file has them, too, and some take time that doubles with every letter of a name.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import prod
from typing import Any

import regex

from veneer.errors import TargetError

_SECONDS = 0.1  # of processor time for one name; an ordinary expression takes microseconds
_REPEATS = 10_000  # of all counts together, a{2} and (a{3}){4}: what compiles them may write each one out
_COUNT = re.compile(r"\{(\d{0,30}),?(\d{0,30})\}")
_NO_COUNT = re.compile(r"(?<!\\)\{(?!\d*,?\d*\})")  # a plain brace, with which regex counts errors


def whole_name(pattern: str, name: str, said: str) -> bool:
    """Whether ``pattern`` matches all of ``name``.

    ``said``: what a refusal calls the pattern. Raises TargetError where it is no regular expression or takes too long.

    Example:
        >>> from veneer.updates.patterns import whole_name
        >>> whole_name(r".*[qk]_proj", "layers.0.q_proj", "targets")
        True
    """
    try:
        found = _compiled(pattern, said).fullmatch(name, timeout=_SECONDS)
    except TimeoutError:
        raise TargetError(
            f"{said} takes too long to compare with {name}; write it without repeats inside of repeats."
        ) from None
    return found is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str, said: str) -> Any:
    if prod(max(1, *(int(n or 1) for n in counts)) for counts in _COUNT.findall(pattern)) > _REPEATS:
        raise TargetError(f"{said} counts more repeats than a module's name has letters.")
    try:
        re.compile(pattern)  # the syntax is Python's, whatever else regex takes
        return regex.compile(_NO_COUNT.sub(r"\\{", pattern))
    except (re.error, regex.error) as error:
        raise TargetError(f"{said} is not a regular expression: {error}.") from None
    except (RecursionError, OverflowError):
        raise TargetError(f"{said} is not a regular expression: it is nested too deeply.") from None
