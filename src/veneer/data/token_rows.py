"""The tokens of many rows in little memory: 4 bytes a token and a label, in a file where they are many.

As Python's lists they took about 68 bytes a token.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, overload
from zlib import crc32

import numpy
from numpy.typing import NDArray

from veneer.data.kept import Spool
from veneer.documents import parsed_json

IGNORE = -100  # the label of a token that is not learned, in PyTorch's cross-entropy and everywhere else
_WIDTH = 4  # bytes of a token
_PART = 2**22  # bytes that are read at a time


@dataclass(frozen=True)
class Tokens:
    """One row as the model sees it. ``labels[i]`` is ``ids[i]`` where token i is learned, else -100.

    For an encoder-decoder ``ids`` is the encoder's input and ``labels`` the decoder's target; for a classifier
    ``labels`` is what `veneer.data.problems.target_of` makes of its label.
    """

    ids: list[int]
    labels: list[int]
    where: str

    @property
    def size(self) -> int:
        """Tokens that are read; of an encoder-decoder or classifier also those of the target."""
        return len(self.ids) if len(self.ids) == len(self.labels) else len(self.ids) + len(self.labels)

    @property
    def learned(self) -> int:
        """Tokens (or classes) that this row is learned from. The first token has none before it to be learned from."""
        return sum(label != IGNORE for label in self.labels)

    @property
    def content(self) -> tuple[object, ...]:
        """What a digest is of."""
        return self.ids, self.labels


class TokenRows(Sequence[Tokens]):
    """A list of `Tokens` that is added to at its end; a row is read when it is asked for.

    >>> rows = TokenRows([Tokens([5, 6, 7], [-100, 6, 7], "rows.jsonl:1")])
    >>> rows[0].ids, rows.lengths.tolist(), rows.nbytes
    ([5, 6, 7], [3], 76)
    """

    def __init__(self, rows: Iterable[Tokens] = ()) -> None:
        self._spool = Spool()
        self._places, self._ids, self._labels = array("q"), array("i"), array("i")
        self._where = array("i")
        self._highest, self._highest_row = -1, 0
        for row in rows:
            self.append(row)

    def append(self, row: Tokens) -> None:
        where = row.where.encode(errors="surrogatepass")
        numbers = numpy.array([*row.ids, *row.labels], dtype=numpy.int32)
        self._places.append(self._spool.add(numbers.tobytes() + where))
        self._ids.append(len(row.ids))
        self._labels.append(len(row.labels))
        self._where.append(len(where))
        if (highest := max(row.ids, default=-1)) > self._highest:
            self._highest, self._highest_row = highest, len(self._ids) - 1

    @property
    def lengths(self) -> NDArray[numpy.int32]:
        """(rows,): the number of each row's ids."""
        return numpy.array(self._ids, dtype=numpy.int32)

    @property
    def label_lengths(self) -> NDArray[numpy.int32]:
        """(rows,): the number of each row's labels."""
        return numpy.array(self._labels, dtype=numpy.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of all, in memory or in the file."""
        return sum(
            size * count for size, count in ((_WIDTH, sum(self._ids) + sum(self._labels)), (1, sum(self._where)))
        ) + len(self) * sum(column.itemsize for column in self._columns())

    def with_highest_token(self) -> Tokens | None:
        """The row with the highest id; None of no rows."""
        return self[self._highest_row] if len(self) else None

    def write(self, file: IO[bytes], note: str) -> None:
        """All rows and a ``note`` as one file's content, which `read` takes back."""
        head = {"rows": len(self), "highest": self._highest, "highest_row": self._highest_row, "note": note}
        parts = [json.dumps(head).encode() + b"\n", *(column.tobytes() for column in self._columns())]
        checked = 0
        for part in chain(parts, self._spool.parts()):
            checked = crc32(part, checked)
            file.write(part)
        file.write(checked.to_bytes(4, "little"))

    @classmethod
    def read(cls, file: IO[bytes]) -> tuple[TokenRows, str]:
        """The rows in an open file, which stays in use, and the note. Raises ValueError for one that was changed."""
        size, checked = os.fstat(file.fileno()).st_size, 0
        for _ in range(0, size - 4, _PART):
            checked = crc32(file.read(min(_PART, size - 4 - file.tell())), checked)
        if size < 4 or checked.to_bytes(4, "little") != file.read():
            raise ValueError("no tokens, or not as they were written")
        file.seek(0)
        head = parsed_json(file.readline())
        rows = cls()
        for column in rows._columns():
            column.fromfile(file, head["rows"])
        rows._highest, rows._highest_row = head["highest"], head["highest_row"]
        rows._spool = Spool(file, file.tell())
        return rows, head["note"]

    def _columns(self) -> tuple[array[int], ...]:
        return self._places, self._ids, self._labels, self._where

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, number: int) -> Tokens: ...
    @overload
    def __getitem__(self, number: slice) -> list[Tokens]: ...
    def __getitem__(self, number: int | slice) -> Tokens | list[Tokens]:
        if isinstance(number, slice):
            return [self._row(one) for one in range(len(self))[number]]
        return self._row(range(len(self))[number])

    def __iter__(self) -> Iterator[Tokens]:
        return (self._row(number) for number in range(len(self)))

    def _row(self, number: int) -> Tokens:
        ids, labels = self._ids[number], self._labels[number]
        size = _WIDTH * (ids + labels)
        content = self._spool.read(self._places[number], size + self._where[number])
        numbers = numpy.frombuffer(content, numpy.int32, ids + labels)
        return Tokens(
            numbers[:ids].tolist(), numbers[ids:].tolist(), content[size:].decode(errors="surrogatepass")
        )  # fmt: skip


def lengths_of(rows: Sequence[Tokens]) -> NDArray[numpy.int32]:
    """(rows,): the number of each row's ids."""
    return rows.lengths if isinstance(rows, TokenRows) else numpy.array([len(row.ids) for row in rows], numpy.int32)


def label_lengths_of(rows: Sequence[Tokens]) -> NDArray[numpy.int32]:
    """(rows,): the number of each row's labels."""
    if isinstance(rows, TokenRows):
        return rows.label_lengths
    return numpy.array([len(row.labels) for row in rows], numpy.int32)


def digest_of(*sides: Sequence[Tokens]) -> str:
    """Sixteen hexadecimal digits of the content of all rows; their text never exists as a whole."""
    made, before = hashlib.sha256(b"["), ""
    for side in sides:
        for row in side:
            made.update((before + json.dumps(row.content)).encode())
            before = ", "
    made.update(b"]")
    return made.hexdigest()[:16]
