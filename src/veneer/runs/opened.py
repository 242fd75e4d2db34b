"""What a person names, a run, an adapter folder or a model, → the model with its adapter on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.data.formats import to_examples
from veneer.data.labels import Renderer
from veneer.data.read import read_rows
from veneer.errors import AdapterFileError, ModelError
from veneer.generation.likelihood import choices_of
from veneer.models.load import load
from veneer.runs.folder import RunFolder
from veneer.runs.prepare import Prepared, prepare, renderer_of
from veneer.training.config import TrainConfig
from veneer.updates.load_adapter import load_adapter
from veneer.updates.peft_config import CONFIG_NAME as ADAPTER_CONFIG
from veneer.updates.peft_config import from_peft
from veneer.updates.record import disabled


@dataclass(frozen=True)
class Opened:
    model: Any
    renderer: Renderer
    adapted: bool
    chat: bool  # whether it was trained on, or comes for, conversations in its template
    own_weights: bool = False  # whether a run trained the model's own, so that its base is another model
    run: RunFolder | None = None  # of a run: its folder


def open_named(source: str | Path) -> Opened:
    """A run folder, a PEFT adapter folder (over the base that it names), or anything that `load` takes.

    A run's rows are not needed, and need not be there any more.
    """
    path, run = Path(source), RunFolder(source)
    if run.exists:
        return _run(run)
    adapted = (path / ADAPTER_CONFIG).is_file()
    model, tokenizer = load(_base_of(path) if adapted else source)
    if adapted:
        load_adapter(model, path)
    return Opened(model, renderer_of(model, tokenizer), adapted, bool(tokenizer.chat_template))


def open_run(folder: Path) -> Prepared:
    """A finished run's model, its adapter on it, and its rows."""
    run = RunFolder(folder)
    config = run.finished_config()
    if config.trains_own_weights:
        return prepare(config, *_loaded(run, config, str(run.model)))
    prepared = prepare(config)
    load_adapter(prepared.model, run.adapter)
    return prepared


def base_of_run(folder: Path) -> Any | None:
    """The model that a run began with, where its result is another one; None where it is under the adapter."""
    run = RunFolder(folder)
    config = run.finished_config()
    return _loaded(run, config, config.model)[0] if config.trains_own_weights else None


@contextmanager
def as_it_was(model: Any, base: Any | None) -> Iterator[Any]:
    """The model before its training: ``base`` where that is another one, else ``model`` without its adapters."""
    if base is not None:
        yield base
        return
    with disabled(model):
        yield model


def labels_of(run: RunFolder) -> list[str]:
    """The few answers of a run's rows, as they follow a prompt; none where they are not few.

    Raises DataError for a run that did not write them down, and whose rows cannot be read any more.
    """
    known: list[str] | None = run.rows().get("choices")
    if known is None:
        config = run.config()
        sources = [config.data, *([config.held_out] if isinstance(config.held_out, str) else [])]
        known = choices_of([example for source in sources for example in to_examples(read_rows(source)).items])
    return known


def _run(run: RunFolder) -> Opened:
    config = run.finished_config()
    own = config.trains_own_weights
    model, tokenizer = _loaded(run, config, str(run.model) if own else run.base_source(config))
    if not own:
        load_adapter(model, run.adapter)
    chat = config.template == "chat" or bool(run.rows()["conversations"])
    return Opened(model, renderer_of(model, tokenizer, config), not own, chat, own, run)


def _loaded(run: RunFolder, config: TrainConfig, source: str) -> tuple[Any, Any]:
    torch.manual_seed(config.seed)  # as before the run: a classification head may be new
    return load(source, **config.kept(), task=config.task, labels=run.rows()["classes"] or None)


def _base_of(folder: Path) -> str:
    from_peft(folder)  # refuses what is no adapter's config
    fields = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = fields.get("base_model_name_or_path")
    if not base:
        raise AdapterFileError(f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path).")
    return str(base)


def refuse_own_weights(source: Path, verb: str) -> None:
    """Raises ModelError where ``source`` is a run whose result is a model, so that it has no adapter to ``verb``."""
    run = RunFolder(source)
    if run.exists and run.result() == run.model:
        raise ModelError(
            f"{source} trained the model's own weights, so there is no adapter to {verb}: {run.model} is a model "
            f"already."
        )
