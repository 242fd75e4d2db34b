"""Rows that a program holds in memory → rows: a list of dicts, a ``datasets`` data set, a pandas or polars frame."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.data.bad import BadRows
from veneer.data.files import class_names, is_text, with_class_names
from veneer.data.read import Row, read_rows
from veneer.data.sources import refuse_weights, sources_of
from veneer.errors import DataError

ACCEPTED = "a path or name, a list of dicts, a datasets.Dataset, a pandas or polars frame, or a list of these"


def rows_of(data: Any, bad: BadRows | None = None) -> list[Row]:
    """The rows of ``data``, which is one of `ACCEPTED`.

    Values become JSON's: NaN and missing values null, arrays lists, so that the rows can be written and read again.

    Rows of files that cannot be read go to ``bad``; without it the first one is an error. Raises DataError for anything
    else, and for data without rows.

    >>> rows_of([{"prompt": "1 + 1 =", "completion": " 2"}])[0].where
    'row 1 of the given rows'
    """
    rows = [row for part in _parts(data) for row in _rows_of_one(part, bad)]
    if not rows:
        raise DataError("The given data holds no rows.")
    return rows


def write_rows(rows: Iterable[Row], file: Path) -> None:
    """One JSON object a line, which `read_rows` reads back as the same values."""
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            line = json.dumps(row.fields, ensure_ascii=False)
            # Half of a surrogate pair, which no encoding has, is refused or left out when the file is read.
            lines.write((line if is_text(line) else json.dumps(row.fields)) + "\n")


def _parts(data: Any) -> list[Any]:
    """``data`` as a list of sources; a list of dicts is one source."""
    if isinstance(data, list | tuple) and not (data and isinstance(data[0], Mapping)):
        return list(data)
    return [data]


def _rows_of_one(part: Any, bad: BadRows | None) -> Sequence[Row]:
    if isinstance(part, str | Path):
        refuse_weights(str(part), "here")
        return [row for source in sources_of(str(part)) for row in read_rows(source.name, bad)]
    what, records = _records(part)
    rows = []
    for number, fields in enumerate(records, start=1):
        where = f"row {number} of the given {what}"
        if not isinstance(fields, Mapping):
            raise DataError(f"{where} is a {type(fields).__name__}, not a dict of named columns.")
        rows.append(Row({str(name): _plain(value, f"{where}, column {name}") for name, value in fields.items()}, where))
    return rows


def _records(part: Any) -> tuple[str, Iterator[Any]]:
    """What a source is called, and its records."""
    kind = f"{type(part).__module__.partition('.')[0]}.{type(part).__name__}"
    if isinstance(part, list | tuple):
        return "rows", iter(part)
    if kind == "pandas.DataFrame":
        return "frame", iter(part.to_dict("records"))
    if kind == "polars.DataFrame":
        return "frame", part.iter_rows(named=True)
    if kind in ("datasets.Dataset", "datasets.IterableDataset"):
        named = class_names(part.features)
        return "data set", (with_class_names(fields, named) for fields in part)
    if kind in ("datasets.DatasetDict", "datasets.IterableDatasetDict"):
        raise DataError(f"data is a DatasetDict; give one of its splits: data[{next(iter(part), 'train')!r}].")
    raise DataError(f"data is a {type(part).__name__}; it may be {ACCEPTED}.")


def _plain(value: Any, where: str) -> Any:
    """``value`` as JSON has it."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, where) for inner in value]
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return _plain(value.tolist(), where)
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' missing values
        return None
    raise DataError(f"{where} holds a {type(value).__name__}, which is no text, number, list or object.")
