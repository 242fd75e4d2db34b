"""The rows of a study, as runs.csv has them. No torch here."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from veneer.errors import DataError

CSV_NAME, JSON_NAME = "runs.csv", "study.json"
KEY = "run"  # the column that names a run


def read_table(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns in order, and each row; numbers as numbers, empty ones as None. Nothing where there is no file.

    Raises DataError for a file that is no CSV in UTF-8, and for a row of more or fewer columns than the first line has.
    """
    if not file.is_file():
        return [], []
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            reader = csv.DictReader(opened)
            head, rows = list(reader.fieldnames or []), list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as CSV: {error}.") from None
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"{file}: row {number} has not the {len(head)} columns of the first line.")
    # A key is a text, also where it looks like a number: 8082631e5967.
    return head, [{name: text if name == KEY else _value(text) for name, text in row.items()} for row in rows]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None
