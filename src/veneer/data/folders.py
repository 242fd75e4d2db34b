"""A folder of data files or texts → the rows of one of its splits: train, unless another is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from veneer.data.bad import BadRow
from veneer.data.files import ROWS, TEXTS, Row, kind_of, read_file
from veneer.errors import DataError, did_you_mean

VALIDATION = ("validation", "valid", "val", "dev")  # what a split of held-out rows is called
# What the names of files say of their split; mlx-lm's, datasets' and torchtext's.
_SPLITS = {
    "train": ("train", "training"), "validation": VALIDATION, "test": ("test", "testing"),
}  # fmt: skip
_ABOUT = ("readme", "license", "licence", "notice", "changelog")  # texts about the files beside them


def read_folder(source: str) -> Iterator[Row | BadRow] | None:
    """The rows of ``folder`` or ``folder:split``; None where that is no folder of files, or one that ``datasets``
    wrote or that describes its files itself.

    Raises DataError for a split that is not there, and for data files and texts in one folder.
    """
    folder, split = _folder_and_split(source)
    if folder is None:
        return None
    splits = splits_of(folder)
    if not splits:
        return None
    if split and split not in splits and (named := next((n for n, words in _SPLITS.items() if split in words), None)):
        split = named
    if split and split not in splits:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(splits)}.{did_you_mean(split, splits)}")
    files = splits[split or ("train" if "train" in splits else next(iter(splits)))]
    return chain.from_iterable(read_file(file) for file in files)


def is_folder_of_files(source: str) -> bool:
    """Whether `read_folder` reads it, so that no data set of that name is meant."""
    folder, _ = _folder_and_split(source)
    return folder is not None and bool(splits_of(folder))


def own_validation(source: str) -> str | None:
    """``folder:validation``, where ``source`` is a folder whose files bring held-out rows; else None."""
    folder, split = _folder_and_split(source)
    splits = splits_of(folder) if folder is not None and split in ("", "train") else {}
    return f"{folder}:validation" if {"train", "validation"} <= splits.keys() else None


def splits_read(source: str) -> str:
    """What a person should know of a folder of several splits; "" for one, and for what is no folder."""
    folder, split = _folder_and_split(source)
    splits = splits_of(folder) if folder is not None and not split else {}
    if folder is None or len(splits) < 2:
        return ""
    found = ", ".join(f"{name} ({_counted(files)})" for name, files in splits.items())
    first = "train" if "train" in splits else next(iter(splits))
    return f"{folder} has the splits {found}, of which {first} is read; {folder}:{list(splits)[-1]} names another."


def splits_of(folder: Path) -> dict[str, list[Path]]:
    """Split → its files, by the words in their names and folders; all are ``train`` where no name says another. Empty
    for a folder without such files, and for one that ``datasets`` wrote or that describes its files itself."""
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")) or _is_described(folder):
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_seen(path.relative_to(folder)))
    rows = [path for path in files if kind_of(path) in ROWS]
    texts = [path for path in files if kind_of(path) in TEXTS and is_data_file(path)]
    if rows and texts:
        raise DataError(
            f"{folder} holds rows ({rows[0].name}) and texts ({texts[0].name}); name the files that are meant, or put "
            f"them into folders of their own."
        )
    splits: dict[str, list[Path]] = {}
    for path in rows or texts:
        splits.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    return splits


def is_data_file(path: Path) -> bool:
    """Whether a file, by its name, holds rows or a text that is not about the files beside it."""
    return kind_of(path) in ROWS or (kind_of(path) in TEXTS and path.stem.lower() not in _ABOUT)


def _folder_and_split(source: str) -> tuple[Path | None, str]:
    path = Path(source).expanduser()
    if path.is_dir():
        return path, ""
    name, _, split = source.rpartition(":")
    path = Path(name).expanduser()
    return (path, split) if name and path.is_dir() else (None, "")


def _counted(files: list[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{len(files)} files"


def _is_seen(path: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in path.parts)


def _is_described(folder: Path) -> bool:
    """Whether its README, as data sets of the hub have it, says which files are which split."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return False
    return head.startswith("---") and bool(re.search(r"^(configs|dataset_info):", head.partition("\n---")[0], re.M))


def _split_of(path: Path) -> str:
    """By the words of its folders; of a file with rows also by those of its name, which the name of a text is not
    for."""
    parts = path.parts if kind_of(path) in ROWS else path.parts[:-1]
    words = [word for part in reversed(parts) for word in re.split(r"[^a-z]+", part.lower())]
    return next((split for word in words for split, names in _SPLITS.items() if word in names), "train")
