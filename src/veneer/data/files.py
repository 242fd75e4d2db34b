"""A file → its rows: JSON lines, JSON, tables as text, Parquet, plain text; each as it is or compressed."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from veneer.data.bad import BadRow
from veneer.errors import DataError

TEXTS = (".txt", ".md")
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
SUFFIXES = (*ROWS, *TEXTS)
_PARQUET_ROWS = 1000  # that are decoded at a time
_SHOWN, _LONGEST = 20, 40  # columns that a refusal names, and letters of each


@dataclass(frozen=True)
class Row:
    """Column → value, and where it stands: ``file:line``, or the data set and the row's number from 1."""

    fields: dict[str, Any]
    where: str

    def names(self) -> str:
        """The names of its columns, as a refusal shows them: the first of many.

        >>> Row({"a": 1, "b": 2}, "rows.jsonl:1").names()
        'a, b'
        """
        names = list(self.fields)
        more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        return ", ".join(name[:_LONGEST] for name in names[:_SHOWN]) + more or "(none)"


Rows = Iterator[Row | BadRow]


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, .gz and .zst aside: ".jsonl"; "" where it is none that is read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def read_file(path: Path) -> Rows:
    """The rows of a file, and those that cannot be read. Raises DataError for a file that cannot be read at all."""
    kind = kind_of(path)
    if not kind:
        known = f"{', '.join(SUFFIXES)} ({' or '.join(COMPRESSED)} may follow)"
        raise DataError(f"{path} ends in {path.suffix or 'nothing'}; data files end in {known}.")
    if kind == ".parquet":
        return _parquet(path)
    return _READERS[kind](path, _lines(path, "" if kind in (".csv", ".tsv") else "\n"))


def json_lines(name: Path | str, lines: Iterable[str]) -> Rows:
    """The rows of JSON lines; ``name`` is what they are called in a refusal."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        if not is_text(line):
            yield BadRow(where, f"{where} is not UTF-8 text; save the file as UTF-8.")
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadRow(where, f"{where} is not JSON: {error}. Each line of a .jsonl file is one object.")
            continue
        yield _row(fields, where)


def decoded(content: bytes) -> str:
    """UTF-8 text, in which a byte that is none is half of a surrogate pair (see `is_text`)."""
    return content.decode("utf-8-sig", errors="surrogateescape")


def is_text(text: str) -> bool:
    """Whether a text has an encoding: no half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(path: Path, newline: str) -> Iterator[str]:
    """The lines of a file as they are, each with what ends it: ``newline``, as in Python's open. A JSON string may hold
    what other lines end with. What is no UTF-8 is as `decoded` has it."""
    how: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    if path.suffix.lower() not in COMPRESSED:
        with path.open(**how) as file:
            yield from file
        return
    import pyarrow

    codec = "gzip" if path.suffix.lower() == ".gz" else "zstd"
    try:
        with io.TextIOWrapper(pyarrow.input_stream(str(path), compression=codec), **how) as unpacked:
            yield from unpacked
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}.") from None


def _json(path: Path, lines: Iterable[str]) -> Rows:
    text = "".join(lines)
    _refuse_other_encoding(path, text)
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg}. (One object a line is .jsonl.)") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path} is not JSON that can be read: {error}.") from None
    if not isinstance(items, list):
        raise DataError(f"{path} holds a JSON {type(items).__name__}; a data file holds a list of objects.")
    return (_row(fields, f"{path} row {number}") for number, fields in enumerate(items, start=1))


def _row(fields: Any, where: str) -> Row | BadRow:
    if not isinstance(fields, dict):
        return BadRow(where, f"{where} holds a {type(fields).__name__}, not an object with named columns.")
    return Row(fields, where)


def _table(path: Path, lines: Iterator[str]) -> Rows:
    # A quoted field may be long and hold line breaks; csv's limit is meant for untrusted input, and is the process's.
    limit = csv.field_size_limit(sys.maxsize)
    columns: list[str] | None = None
    first_line = 1
    try:
        before = list(_through_header(lines))
        reader = csv.reader(chain(before, lines), delimiter=_delimiter(path, before[-1] if before else ""), strict=True)
        for values in reader:
            where, first_line = f"{path}:{first_line}", reader.line_num + 1
            if not values:
                continue
            if columns is None:
                columns = _header(values, where)
            elif len(values) != len(columns):
                yield BadRow(
                    where,
                    f"{where} has {len(values)} values, but the header names {len(columns)} columns; put quotes around "
                    f"a value that holds the separator.",
                )
            elif not all(map(is_text, values)):
                yield BadRow(where, f"{where} is not UTF-8 text; save the file as UTF-8.")
            else:
                yield Row(dict(zip(columns, values, strict=True)), where)
    except csv.Error as error:  # where the next row begins is not known then
        raise DataError(f"{path}:{first_line} cannot be read: {error}.") from None
    finally:
        csv.field_size_limit(limit)


def _header(columns: list[str], where: str) -> list[str]:
    if not all(map(is_text, columns)):
        raise DataError(f"{where} is not UTF-8 text; save the file as UTF-8.")
    twice = sorted(column for column, times in Counter(columns).items() if times > 1)
    if twice:
        raise DataError(f"{where} names the column {', '.join(twice)} twice; which one is meant?")
    return columns


def _through_header(lines: Iterator[str]) -> Iterator[str]:
    """Empty lines, and the first that is not."""
    for line in lines:
        yield line
        if line.strip():
            return


def _delimiter(path: Path, header: str) -> str:
    """What stands between columns: as the header has it, for Excel writes semicolons where commas are decimal."""
    if kind_of(path) == ".tsv":
        return "\t"
    return next((sign for sign in (",", ";", "\t") if sign in header), ",")


def _plain(path: Path, lines: Iterable[str]) -> Rows:
    """A text is one row."""
    text = "".join(lines)
    _refuse_other_encoding(path, text)
    return iter([Row({"text": text}, f"{path}")] if text.strip() else [])


def _refuse_other_encoding(path: Path, text: str) -> None:
    if not is_text(text):
        line = next(number for number, line in enumerate(text.split("\n"), start=1) if not is_text(line))
        raise DataError(f"{path}:{line} is not UTF-8 text; save the file as UTF-8.")


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            named = {}
            if b"huggingface" in (file.schema_arrow.metadata or {}):  # datasets wrote it, and what its columns are
                import datasets

                named = class_names(datasets.Features.from_arrow_schema(file.schema_arrow))
            for batch in file.iter_batches(_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(with_class_names(fields, named), f"{path} row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def class_names(features: Mapping[str, Any] | None) -> dict[str, Any]:
    """The columns of a data set that it keeps as numbers of classes, which have names: a model can learn these."""
    kinds = ((column, getattr(kind, "feature", kind)) for column, kind in (features or {}).items())
    return {column: kind for column, kind in kinds if hasattr(kind, "int2str")}


def with_class_names(fields: dict[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its classes by name, those in lists, too; -1 stands for none."""
    return {**fields, **{column: _class_name(fields[column], kind) for column, kind in named.items()}}


def _class_name(number: Any, kind: Any) -> Any:
    if isinstance(number, list):
        return [_class_name(each, kind) for each in number]
    return kind.int2str(number) if number is not None and number >= 0 else None


_READERS: dict[str, Callable[[Path, Iterator[str]], Rows]] = {
    ".jsonl": json_lines, ".ndjson": json_lines, ".json": _json, ".csv": _table, ".tsv": _table,
    ".txt": _plain, ".md": _plain,
}  # fmt: skip
