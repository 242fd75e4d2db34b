"""A file, folder or name of a data set → its rows, each with the place it came from for the message about a bad one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veneer.data.bad import BadRow, BadRows
from veneer.data.bbc import BBC_TOPICS, bbc_topics
from veneer.data.files import Row, Rows, decoded, json_lines, kind_of, read_file
from veneer.data.folders import is_folder_of_files, read_folder
from veneer.data.hub import read_data_set, validation_beside
from veneer.data.kept import Kept
from veneer.errors import DataError

__all__ = ["Row", "read_lines", "read_rows"]


def read_rows(source: str | Path, bad: BadRows | None = None) -> Sequence[Row]:
    """The rows of a file (JSONL, JSON, CSV, TSV, Parquet, text; also .gz and .zst), of a folder of such files, of a
    ``datasets`` folder or name, or the packaged bbc-topics.

    A source with several splits gives its ``train`` split; ``name:test`` gives another one. Rows that cannot be
    read go to ``bad``; without it the first one is an error. They need not fit the memory: a file is read line by line,
    and many rows are kept on the disk.

    Raises DataError, with file and line, for a row that cannot be read, and for a source that holds none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        found = read_file(path)
    elif str(source) == BBC_TOPICS:
        found = iter(Row(fields, where) for fields, where in bbc_topics())
    else:
        rows = read_folder(str(source))
        found = rows if rows is not None else read_data_set(str(source))
    return _sorted_out(found, str(source), bad)


def set_validation(source: str) -> str | None:
    """The validation split of a data set of the hub, or of a folder that ``datasets`` wrote, whose train split
    ``source`` names; None of any other source. Raises DataError where it cannot be loaded."""
    path = Path(source).expanduser()
    if path.is_file() or kind_of(path) or source == BBC_TOPICS or is_folder_of_files(source):
        return None
    return validation_beside(source)


def read_lines(content: bytes, name: str, bad: BadRows | None = None) -> Sequence[Row]:
    """The rows of JSON lines that came in no file; ``name`` is what they are called in a refusal.

    Raises DataError, with the line, for a row that cannot be read, and where there is none.
    """
    return _sorted_out(json_lines(name, decoded(content).split("\n")), name, bad)


def _sorted_out(found: Rows, source: str, bad: BadRows | None) -> Sequence[Row]:
    """The rows; those that cannot be read apart."""
    rows, own = Kept[Row](), BadRows()
    for row in found:
        if isinstance(row, BadRow):
            own.rows.append(row)
        else:
            rows.append(row)
    if bad is None or not len(rows):
        own.refuse()
    if not len(rows):
        raise DataError(f"{source} holds no rows.")
    if bad is not None:
        bad.rows += own.rows
    return rows
