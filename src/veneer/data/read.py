"""A file, folder or name of a data set → its rows, each with the place it came from for the message about a bad one."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.data.bbc import BBC_TOPICS, bbc_topics
from veneer.data.kept import Kept
from veneer.errors import DataError, did_you_mean
from veneer.models.source import hub_unreachable

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_PARQUET_ROWS = 1000  # that are decoded at a time


@dataclass(frozen=True)
class Row:
    """Column → value, and where it stands: ``file:line``, or the data set and the row's number from 1."""

    fields: dict[str, Any]
    where: str


def read_rows(source: str | Path) -> Sequence[Row]:
    """The rows of a JSONL, JSON, CSV, TSV or Parquet file, a ``datasets`` folder or name, or the packaged bbc-topics.

    A data set with several splits gives its ``train`` split; ``name:test`` gives another one.
    They need not fit the memory: a file is read line by line, and many rows are kept on the disk.

    Raises DataError, with file and line, for a row that cannot be read, and for a source that holds none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = Kept(_read_file(path))
    elif str(source) == BBC_TOPICS:
        rows = Kept(Row(fields, where) for fields, where in bbc_topics())
    else:
        rows = Kept(_read_data_set(str(source)))
    if not len(rows):
        raise DataError(f"{source} holds no rows.")
    return rows


def read_lines(content: bytes, name: str) -> list[Row]:
    """The rows of JSON lines that came in no file; ``name`` is what they are called in a refusal.

    Raises DataError, with the line, for a row that cannot be read, and where there is none.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{name}:{line} is not UTF-8 text.") from None
    rows = list(_read_jsonl(name, text.split("\n")))
    if not rows:
        raise DataError(f"{name} holds no rows.")
    return rows


def _read_file(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix not in _SUFFIXES:
        raise DataError(f"{path} ends in {suffix or 'nothing'}; data files end in {', '.join(_SUFFIXES)}.")
    if suffix == ".jsonl":
        return _read_jsonl(path, _lines(path))
    if suffix == ".json":
        return _read_json(path, "".join(_lines(path)))
    return _read_csv(path, "\t" if suffix == ".tsv" else ",")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file of UTF-8, each with the \\n that ends it; a JSON string may hold the other characters that
    str.splitlines breaks at."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError:
        raise DataError(f"{path}:{_undecodable(path)} is not UTF-8 text; save the file as UTF-8.") from None


def _undecodable(path: Path) -> int:
    """The number of the first line that is no UTF-8."""
    number = 0
    with suppress(UnicodeDecodeError), path.open("rb") as file:
        for line in file:
            number += 1
            line.decode()
    return number


def _read_jsonl(path: Path | str, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}. Each line of a .jsonl file is one object.") from None
        yield _row(fields, where)


def _read_json(path: Path, text: str) -> Iterator[Row]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg}. (One object a line is .jsonl.)") from None
    except RecursionError as error:
        raise DataError(f"{path} is not JSON that can be read: {error}.") from None
    if not isinstance(items, list):
        raise DataError(f"{path} holds a JSON {type(items).__name__}; a data file holds a list of objects.")
    for number, fields in enumerate(items, start=1):
        yield _row(fields, f"{path} row {number}")


def _row(fields: Any, where: str) -> Row:
    if not isinstance(fields, dict):
        raise DataError(f"{where} holds a {type(fields).__name__}, not an object with named columns.")
    return Row(fields, where)


def _read_csv(path: Path, delimiter: str) -> Iterator[Row]:
    # A quoted field may be long and hold line breaks; csv's limit is meant for untrusted input.
    csv.field_size_limit(max(path.stat().st_size, 131072))
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    first_line = 1
    try:
        for values in reader:
            where, first_line = f"{path}:{first_line}", reader.line_num + 1
            if not values:
                continue
            if columns is None:
                columns = values
                twice = sorted(column for column, times in Counter(columns).items() if times > 1)
                if twice:
                    raise DataError(f"{where} names the column {', '.join(twice)} twice; which one is meant?")
            elif len(values) != len(columns):
                raise DataError(
                    f"{where} has {len(values)} values, but the header names {len(columns)} columns; put quotes around "
                    f"a value that holds the separator."
                )
            else:
                yield Row(dict(zip(columns, values, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}:{first_line} cannot be read: {error}.") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"{path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _read_data_set(source: str) -> Iterator[Row]:
    """A folder that ``datasets`` wrote or that holds data files, or a name on the hub."""
    import datasets

    name, colon, split = source.rpartition(":")
    if not colon or Path(source).exists():
        name, split = source, ""
    path = Path(name).expanduser()
    if not path.exists() and (path.suffix in _SUFFIXES or name.startswith((".", "/", "~"))):
        siblings = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {name}.{did_you_mean(name, siblings)}")
    offline = "" if path.exists() else hub_unreachable()
    if offline and not _in_datasets_cache(name):
        raise DataError(f"{source!r} is no file here ({', '.join(_SUFFIXES)}), and not {BBC_TOPICS}. {offline}")
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    read, where = (datasets.load_from_disk if saved else datasets.load_dataset), str(path) if path.is_dir() else name
    try:
        data = read(where)
    except Exception as error:  # its own errors, the hub client's, pyarrow's, and those of each kind of file
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"datasets could not load {source!r}: {reason}") from None
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
    if isinstance(data, datasets.DatasetDict):
        split = split or ("train" if "train" in data or len(data) > 1 else next(iter(data)))
        if split not in data:
            raise DataError(
                f"{name} has no split {split!r}; it has {', '.join(data)}. Name one as {name}:{next(iter(data))}."
            )
        data = data[split]
    elif split and split != str(data.split):
        raise DataError(f"{name} is a single data set without splits; name it without :{split}.")
    # A class that the data set keeps as a number has a name, and that is what a model can learn.
    named = {column: kind for column, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, fields in enumerate(data, start=1):
        known = {c: kind.int2str(fields[c]) for c, kind in named.items() if fields[c] is not None and fields[c] >= 0}
        unknown = dict.fromkeys(named.keys() - known.keys())  # -1 stands for no label
        yield Row({**fields, **unknown, **known}, f"{source} row {number}")


def _in_datasets_cache(name: str) -> bool:
    """Whether ``datasets`` prepared this data set before; it then loads it without the hub."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___").lower()).is_dir()
