"""A data set of the hub, or a folder that ``datasets`` wrote → the rows of one of its splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from veneer.data.bbc import BBC_TOPICS
from veneer.data.files import SUFFIXES, Row, class_names, kind_of, with_class_names
from veneer.data.folders import VALIDATION
from veneer.errors import DataError, did_you_mean
from veneer.models.source import hub_unreachable


def read_data_set(source: str) -> Iterator[Row]:
    """The rows of ``name``, ``name:split``, ``name:config`` or ``name:config:split``.

    Raises DataError where there is none, or the name does not say which configuration is meant.
    """
    import datasets

    name, parts = _name_and_parts(source)
    data, split = _data_set(source, name, parts)
    if isinstance(data, datasets.DatasetDict):
        split = split or ("train" if "train" in data or len(data) > 1 else next(iter(data)))
        if split not in data:
            raise DataError(
                f"{name} has no split {split!r}; it has {', '.join(data)}. Name one as {name}:{next(iter(data))}."
            )
        data = data[split]
    elif split and split != str(data.split):
        raise DataError(f"{name} is a single data set without splits; name it without :{split}.")
    named = class_names(data.features)
    return (
        Row(with_class_names(fields, named), f"{source} row {number}") for number, fields in enumerate(data, start=1)
    )


def _data_set(source: str, name: str, parts: list[str]) -> tuple[Any, str]:
    """All that ``source`` names, quietly, and the split that it names. Raises DataError where there is none."""
    import datasets

    path = Path(name).expanduser()
    if not path.exists() and (kind_of(path) or name.startswith((".", "/", "~"))):
        siblings = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {name}.{did_you_mean(name, siblings)}")
    offline = "" if path.exists() else hub_unreachable()
    if offline and not _in_datasets_cache(name):
        raise DataError(f"{source!r} is no file here ({', '.join(SUFFIXES)}), and not {BBC_TOPICS}. {offline}")
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        load, split = _asked(name, str(path) if path.is_dir() else name, parts)
        return _loaded(load, source), split
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def validation_beside(source: str) -> str | None:
    """The validation split of the data set whose train split ``source`` names, as another name; None where it has none,
    and where another split is named. Raises DataError as `read_data_set` does."""
    name, parts = _name_and_parts(source)
    data, split = _data_set(source, name, parts)
    if not hasattr(data, "keys") or split not in ("", "train") or "train" not in data:
        return None
    found = next((split for split in VALIDATION if split in data), None)
    config = [] if not parts or parts == ["train"] else parts[:1]
    return None if found is None else ":".join([name, *config, found])


def _name_and_parts(source: str) -> tuple[str, list[str]]:
    """The data set's name, and what follows it after colons."""
    if Path(source).expanduser().exists():
        return source, []
    pieces = source.split(":")
    start = 2 if len(pieces) > 1 and len(pieces[0]) == 1 and pieces[1][:1] in ("\\", "/") else 1  # a drive's letter
    return ":".join(pieces[:start]), pieces[start:]


def _loaded(load: Callable[[], Any], source: str) -> Any:
    """What ``load()`` gives. Raises DataError."""
    try:
        return load()
    except Exception as error:  # its own errors, the hub client's, pyarrow's, and those of each kind of file
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"datasets could not load {source!r}: {reason}") from None


def _asked(name: str, where: str, parts: list[str]) -> tuple[Callable[[], Any], str]:
    """The call of datasets that loads the data set or its splits; and the split that is named."""
    import datasets

    if any((Path(where) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return partial(datasets.load_from_disk, where), parts[-1] if parts else ""
    if len(parts) > 2:
        raise DataError(f"{':'.join([name, *parts])} has too many parts; a data set is named as name:config:split.")
    configs = _configs(where)
    if len(parts) == 2 or (parts and parts[0] in configs):
        config, split = parts[0], parts[1] if len(parts) == 2 else ""
    else:
        config, split = "", parts[0] if parts else ""
    if config and configs and config not in configs:
        raise DataError(
            f"{name} has no configuration {config!r}; it has {_some(configs)}.{did_you_mean(config, configs)}"
        )
    if not config and len(configs) > 1 and "default" not in configs:
        raise DataError(
            f"{name} has several configurations, {_some(configs)}; name one as {name}:{configs[0]}"
            f"{f':{split}' if split else ''}."
        )
    return partial(datasets.load_dataset, where, *([config] if config else [])), split


def _configs(where: str) -> list[str]:
    """The configurations of a data set; none where they cannot be listed, as of one that is only in the cache."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(where)
    except Exception:  # as for loading, which then says what is wrong
        return []
    return list(names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _in_datasets_cache(name: str) -> bool:
    """Whether ``datasets`` prepared this data set before; it then loads it without the hub."""
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___").lower()).is_dir()
