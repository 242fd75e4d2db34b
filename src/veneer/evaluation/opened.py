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
from veneer.training.prepare import Prepared, prepare
from veneer.training.run import ADAPTER
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
    """A run folder, a PEFT adapter folder (over the base that it names), or anything that `load` takes."""
    path = Path(source)
    if (path / CONFIG_NAME).is_file():
        prepared = open_run(path)
        chat = prepared.config.template == "chat" or bool(prepared.train[0].messages)
        return Opened(prepared.model, prepared.tokeniser, True, chat)
    if (path / ADAPTER_CONFIG).is_file():
        model, tokenizer = load(_base_of(path))
        load_adapter(model, path)
    else:
        model, tokenizer = load(source)
    tokeniser = Tokeniser(tokenizer, seq2seq=bool(getattr(model.config, "is_encoder_decoder", False)))
    return Opened(model, tokeniser, (path / ADAPTER_CONFIG).is_file(), bool(tokenizer.chat_template))


def open_run(folder: Path, **over: Any) -> Prepared:
    """A finished run's base with its adapter on it, and its rows."""
    config = TrainConfig.read(folder / CONFIG_NAME, **over)
    if not (folder / ADAPTER / ADAPTER_CONFIG).is_file():
        raise TrainingError(f"{folder} has no adapter yet; finish the run: veneer train --resume {folder}")
    prepared = prepare(config)
    load_adapter(prepared.model, folder / ADAPTER)
    return prepared


def _base_of(folder: Path) -> str:
    from_peft(folder)  # refuses what is no adapter's config
    fields = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = fields.get("base_model_name_or_path")
    if not base:
        raise AdapterFileError(f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path).")
    return str(base)
