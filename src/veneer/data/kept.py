"""Rows that need not fit the memory: a few are kept there, and more in a file that only this process sees.

The file has no name, so nobody reads half of it and nothing is left of a process that was killed. It is read a row at a
time, and not mapped: pages of a map would count as the process's memory.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Generic, TypeVar, overload

from veneer.errors import DataError
from veneer.files import cache_folder

_IN_MEMORY = 2**22  # bytes

T = TypeVar("T")


class Spool:
    """Bytes that are added once and read at their place, in memory while they are few; or those of a ``file`` from
    ``start`` on, to which nothing is added."""

    def __init__(self, file: IO[bytes] | None = None, start: int = 0) -> None:
        self._latest = bytearray()
        self._file, self._start = file, start
        self.written = os.fstat(file.fileno()).st_size - start if file is not None else 0  # bytes of the file

    def add(self, content: bytes) -> int:
        """Put ``content`` at the end; its place. Raises DataError where the disk is full."""
        place = self.written + len(self._latest)
        self._latest += content
        if len(self._latest) > _IN_MEMORY:
            self._write()
        return place

    def read(self, place: int, size: int) -> bytes:
        """``size`` bytes that were added together, or a part of them, from ``place`` on."""
        if self._file is None or place >= self.written:
            return bytes(self._latest[place - self.written : place - self.written + size])
        return os.pread(self._file.fileno(), size, self._start + place)

    def parts(self) -> Iterator[bytes]:
        """All bytes, a few at a time."""
        for place in range(0, self.written, _IN_MEMORY):
            yield self.read(place, min(_IN_MEMORY, self.written - place))
        yield bytes(self._latest)

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = _nameless_file()
            self._file.write(self._latest)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"The rows are too many for the memory, and cannot be kept in {cache_folder()}: "
                f"{error.strerror or error}. Make room there, or let XDG_CACHE_HOME name a folder on another disk."
            ) from None
        self.written += len(self._latest)
        self._latest = bytearray()


def _nameless_file() -> IO[bytes]:
    """In the cache folder: the system's temporary one is often memory."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


class Kept(Sequence[T], Generic[T]):
    """A list of objects that is added to at its end. Where they are many, another, equal object is made each time that
    one is asked for.

    >>> rows = Kept(["a", "b", "c"])
    >>> len(rows), rows[-1], rows[:2], list(rows.at([2, 0]))
    (3, 'c', ['a', 'b'], ['c', 'a'])
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._spool, self._places = Spool(), array("q", [0])
        self._live: list[T] = []  # all of them, while they are few
        self._numbers: Sequence[int] | None = None
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        content = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        self._places.append(self._spool.add(content) + len(content))
        if not self._spool.written:
            self._live.append(item)
        elif self._live:
            self._live = []

    def at(self, numbers: Iterable[int]) -> Kept[T]:
        """Those of these numbers, in this order, of the same file; nothing is added to them."""
        some: Kept[T] = Kept()
        some._spool, some._places, some._live = self._spool, self._places, self._live
        known = self._numbers
        some._numbers = array("q", numbers if known is None else (known[number] for number in numbers))
        return some

    def digest(self) -> str | None:
        """Hexadecimal digits that other items would not have; None where they are few, and none is worth keeping."""
        if not self._spool.written:
            return None
        made = hashlib.sha256()
        for number in range(len(self)):
            made.update(self._content(number))
        return made.hexdigest()

    def __len__(self) -> int:
        return len(self._places) - 1 if self._numbers is None else len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...
    def __getitem__(self, number: int | slice) -> T | list[T]:
        if isinstance(number, slice):
            return [self._item(one) for one in range(len(self))[number]]
        return self._item(range(len(self))[number])

    def __iter__(self) -> Iterator[T]:
        return (self._item(number) for number in range(len(self)))

    def _item(self, number: int) -> T:
        if self._live:
            return self._live[number if self._numbers is None else self._numbers[number]]
        item: T = pickle.loads(self._content(number))  # what this process wrote into a file of its own
        return item

    def _content(self, number: int) -> bytes:
        place = number if self._numbers is None else self._numbers[number]
        start, end = self._places[place], self._places[place + 1]
        return self._spool.read(start, end - start)


def those_of(items: Sequence[T], numbers: Sequence[int]) -> Sequence[T]:
    """The items of these numbers, in this order; of `Kept` ones where they are."""
    return items.at(numbers) if isinstance(items, Kept) else [items[number] for number in numbers]
