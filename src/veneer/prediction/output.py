"""Records → a JSONL, CSV or Parquet file. What the rows hold is looked at before anything is predicted."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from veneer.data.read import Row
from veneer.errors import DataError, did_you_mean
from veneer.files import atomic_file
from veneer.prediction.result import PREDICTION, PROBABILITY, Prediction


def kept_columns(rows: list[Row], keep: list[str] | None, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """The columns of each row that the output has. Raises DataError for a name that no row has, and for a column that
    has the name of one that is added."""
    columns = list(dict.fromkeys(name for row in rows for name in row.fields))
    for name in keep or []:
        if name not in columns:
            raise DataError(
                f"keep names {name!r}, and the rows have no such column.{did_you_mean(name, columns)} They have: "
                f"{', '.join(columns)}."
            )
    kept = columns if keep is None else keep
    added = [PREDICTION, *(f"{PROBABILITY}{label}" for label in labels)]
    taken = [name for name in kept if name in added]
    if taken:
        raise DataError(
            f"The rows have a column {taken[0]} already, which the prediction adds; rename it, or name the columns to "
            f"keep with --keep."
        )
    return [{name: row.fields[name] for name in kept if name in row.fields} for row in rows]


class Output:
    """A file to be written whole, at the end, from the kept columns of the rows and a prediction for each.

    Raises DataError, before anything is written, for values that the file's form cannot hold.
    """

    def __init__(self, path: Path, rows: list[Row], kept: list[dict[str, Any]]) -> None:
        self.path = path
        self._suffix = path.suffix.lower()
        if self._suffix == ".parquet":
            self._table = _table(path, kept)
        else:
            self._kept = [plain(fields, row.where) for fields, row in zip(kept, rows, strict=True)]

    def write(self, predictions: list[Prediction]) -> None:
        with atomic_file(self.path) as temporary:
            if self._suffix == ".parquet":
                self._write_parquet(temporary, predictions)
                return
            records = [{**fields, **each.columns} for fields, each in zip(self._kept, predictions, strict=True)]
            with temporary.open("w", encoding="utf-8", newline="") as file:
                (write_lines if self._suffix == ".jsonl" else _write_csv)(file, records)

    def _write_parquet(self, file: Path, predictions: list[Prediction]) -> None:
        import pyarrow
        import pyarrow.parquet

        table = self._table
        added = pyarrow.Table.from_pylist([prediction.columns for prediction in predictions])
        for name in added.column_names:
            table = table.append_column(name, added[name]) if table.num_columns else added.select([name])
        pyarrow.parquet.write_table(table, file)


def write_lines(file: IO[str], records: list[dict[str, Any]]) -> None:
    """A JSON object a line."""
    file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write_csv(file: IO[str], records: list[dict[str, Any]]) -> None:
    """A list or object is JSON in its cell; what a row has not is empty."""
    header = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(file, header, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _cell(value) for name, value in record.items()})


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _table(path: Path, kept: list[dict[str, Any]]) -> Any:
    import pyarrow

    names = list(dict.fromkeys(name for fields in kept for name in fields))
    columns = {}
    for name in names:
        try:
            columns[name] = pyarrow.array([fields.get(name) for fields in kept])
        except pyarrow.ArrowException as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"The column {name} cannot be written to {path}, as its values are of several types ({reason}); write "
                f".jsonl, or name the columns to keep with --keep."
            ) from None
    return pyarrow.table(columns)


def plain(value: Any, where: str, column: str = "") -> Any:
    """``value`` as JSON has it: dates as text, decimals as numbers, what is not finite as null. Raises DataError for
    what JSON cannot hold."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(inner, where, column or str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, where, column) for inner in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise DataError(
        f"{where}: {column} holds {type(value).__name__}, which is no text, number, list or object; name the columns "
        f"to keep with --keep."
    )
