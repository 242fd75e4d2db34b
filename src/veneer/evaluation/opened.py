"""What a person names, a run, an adapter folder or a model, → the model with its adapter on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.data.labels import Tokeniser
from veneer.errors import AdapterFileError, TrainingError
from veneer.frozen.load import load
from veneer.training.config import CONFIG_NAME, TrainConfig
from veneer.training.prepare import Prepared, prepare, tokeniser_of
from veneer.training.run import ADAPTER, ROWS
from veneer.updates.adapter_file import load_adapter
from veneer.updates.peft_config import CONFIG_NAME as ADAPTER_CONFIG
from veneer.updates.peft_config import from_peft


@dataclass(frozen=True)
class Opened:
    model: Any
    tokeniser: Tokeniser
    adapted: bool
    chat: bool  # whether it was trained on, or comes for, conversations in its template


def open_named(source: str | Path) -> Opened:
    """A run folder, a PEFT adapter folder (over the base that it names), or anything that `load` takes.

    A run's rows are not needed, and need not be there any more.
    """
    path = Path(source)
    if (path / CONFIG_NAME).is_file():
        return _run(path)
    adapted = (path / ADAPTER_CONFIG).is_file()
    model, tokenizer = load(_base_of(path) if adapted else source)
    if adapted:
        load_adapter(model, path)
    return Opened(model, tokeniser_of(model, tokenizer), adapted, bool(tokenizer.chat_template))


def open_run(folder: Path) -> Prepared:
    """A finished run's base with its adapter on it, and its rows."""
    config = _finished(folder)
    prepared = prepare(config)
    load_adapter(prepared.model, folder / ADAPTER)
    return prepared


def _run(folder: Path) -> Opened:
    config = _finished(folder)
    rows = json.loads((folder / ROWS).read_text(encoding="utf-8"))
    model, tokenizer = load(config.base(), **config.kept(), task=config.task, labels=rows["classes"] or None)
    load_adapter(model, folder / ADAPTER)
    chat = config.template == "chat" or bool(rows["conversations"])
    return Opened(model, tokeniser_of(model, tokenizer, config), True, chat)


def _finished(folder: Path) -> TrainConfig:
    if not (folder / ADAPTER / ADAPTER_CONFIG).is_file():
        raise TrainingError(f"{folder} has no adapter yet; finish the run: veneer train --resume {folder}")
    return TrainConfig.read(folder / CONFIG_NAME, output=str(folder))


def _base_of(folder: Path) -> str:
    from_peft(folder)  # refuses what is no adapter's config
    fields = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = fields.get("base_model_name_or_path")
    if not base:
        raise AdapterFileError(f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path).")
    return str(base)
