"""Several sources of rows in one name: ``a.jsonl,b.jsonl=2``; and how often the rows of each are learned."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.data.formats import Example
from veneer.data.kept import those_of
from veneer.errors import DataError, shown


@dataclass(frozen=True)
class Source:
    """A file, folder or name, and how often each of its rows is learned in an epoch."""

    name: str
    times: float = 1.0

    def __str__(self) -> str:
        return self.name if self.times == 1 else f"{self.name}={self.times:g}"


def sources_of(text: str) -> list[Source]:
    """The sources that ``text`` names; one whose name has a comma is that one, where it exists.

    Raises DataError for a source without a name, or one that is to be learned no times.

    >>> sources_of("a.jsonl,b.jsonl=0.5")
    [Source(name='a.jsonl', times=1.0), Source(name='b.jsonl', times=0.5)]
    """
    if _is_one(text):
        return [Source(text)]
    return [_source(part.strip(), text) for part in text.split(",")]


def refuse_weights(text: str, where: str) -> None:
    """Raises DataError where a source says how often its rows are learned, and ``where`` none are."""
    for source in sources_of(text):
        if source.times != 1:
            raise DataError(
                f"{source} says how often its rows are learned, which means nothing {where}; leave out "
                f"={source.times:g}."
            )


def named_sources(value: Any) -> Any:
    """A list of paths and names, or a mapping from these to how often their rows are learned, as one text; anything
    else as it is.

    >>> named_sources({"a.jsonl": 1, "b.jsonl": 2})
    'a.jsonl,b.jsonl=2'
    """
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping) and all(isinstance(times, int | float) for times in value.values()):
        return ",".join(str(Source(str(name), times)) for name, times in value.items())
    is_named = isinstance(value, Sequence) and value and all(isinstance(part, str | Path) for part in value)
    return ",".join(map(str, value)) if is_named and not isinstance(value, str) else value


def weighted(examples: Sequence[Example], seed: int) -> Sequence[Example]:
    """The examples, each as often as its source says: twice for 2; for 0.5 every other one of them, drawn by ``seed``;
    for 1.5 all, and half of them again."""
    drawn = random.Random(seed)
    numbers = array("q")
    for number, example in enumerate(examples):
        whole, part = divmod(example.times, 1)
        numbers.extend([number] * (int(whole) + (drawn.random() < part if part else 0)))
    return those_of(examples, numbers)


def _is_one(text: str) -> bool:
    if Path(text).expanduser().exists():
        return True
    return "," not in text and "=" not in text


def _source(part: str, text: str) -> Source:
    name, equals, number = part.rpartition("=")
    if not equals or Path(part).expanduser().exists():
        name, number = part, "1"
    try:
        times = float(number)
    except ValueError:
        raise DataError(
            f"{shown(part)} of {shown(text)} is no source=number, how often its rows are learned."
        ) from None
    if not name or not 0 < times < 1000:
        raise DataError(f"{shown(part)} of {shown(text)} names no source, or rows that are learned no times.")
    return Source(name, times)
