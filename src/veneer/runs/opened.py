"""What a person names, a run, an adapter folder or a model, → the model with its adapter on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from veneer.data.bad import BadRows
from veneer.data.columns import Reading
from veneer.data.dates import pin_date
from veneer.data.labels import Renderer
from veneer.device import AUTO, CPU
from veneer.errors import ModelError
from veneer.generation.likelihood import choices_of
from veneer.models.load import load
from veneer.runs.adapter import load_adapted
from veneer.runs.computing import computing_of
from veneer.runs.facts import is_chat, read_facts
from veneer.runs.folder import RunFolder
from veneer.runs.own_tokens import with_the_runs_tokens
from veneer.runs.placing import place_for_use
from veneer.runs.prepare import Prepared, prepare, renderer_of
from veneer.runs.rows import held_out_of, read_examples
from veneer.training.config import TrainConfig
from veneer.updates.load_adapter import load_adapter
from veneer.updates.peft_config import CONFIG_NAME as ADAPTER_CONFIG
from veneer.updates.record import disabled


@dataclass(frozen=True)
class Opened:
    model: Any
    renderer: Renderer
    adapted: bool
    chat: bool  # whether it was trained on, or comes for, conversations in its template
    own_weights: bool = False  # whether a run trained the model's own, so that its base is another model
    run: RunFolder | None = None  # of a run: its folder
    choices: tuple[str, ...] = ()  # of an adapter alone: the few answers of its rows


def open_named(source: str | Path, compute: str = "auto", device: str = CPU) -> Opened:
    """A run folder, a PEFT adapter folder (over the base that it names), or anything that `load` takes.

    A run's rows are not needed, and need not be there any more; nor is the run, where its adapter folder is.
    ``compute``: auto, that of the run, or of a model what is faster here; fp32 or bf16.
    ``device``: where it is put; auto: a GPU that holds it, else the CPU.
    """
    device = place_for_use(source, device)
    path, run = Path(source), RunFolder(source)
    if run.exists:
        return _run(run, compute, device)
    if (path / ADAPTER_CONFIG).is_file():
        return open_adapter(path, compute=compute, device=device)
    model, tokenizer = load(source, compute=compute, device=device)
    return Opened(model, renderer_of(model, tokenizer), False, bool(tokenizer.chat_template))


def open_adapter(folder: Path, base: str | None = None, compute: str = "auto", device: str = CPU) -> Opened:
    """An adapter folder, over ``base`` or the one that it names; prompts and classes as its veneer.json says.

    One without veneer.json, of PEFT or `save`, has the base's own template and, as a classifier, numbered classes.
    """
    model, tokenizer = load_adapted(folder, base, device=device, **({} if compute == "auto" else {"compute": compute}))
    facts = read_facts(folder)
    if facts is None:
        return Opened(model, renderer_of(model, tokenizer), True, bool(tokenizer.chat_template))
    prompts = facts.prompts
    return Opened(model, renderer_of(model, tokenizer, prompts), True, prompts.chat, choices=tuple(facts.choices))


def open_run(folder: Path, compute: str = "auto", device: str = CPU) -> Prepared:
    """A finished run's model, its adapter on it, and its rows; ``compute``: auto is the run's own; ``device``: as of
    `open_named`."""
    device, run = place_for_use(folder, device), RunFolder(folder)
    config = run.finished_config()
    elsewhere = config.model_copy(update={"device": AUTO})  # the run's own need not be here
    if config.trains_own_weights:
        return prepare(elsewhere, *_loaded(run, config, str(run.model), device=device))
    facts = read_facts(run.adapter)
    if facts is not None and facts.own_tokenizer:
        opened = _run(run, compute, device)
        return prepare(elsewhere.model_copy(update={"compute": "auto"}), opened.model, opened.renderer.tokenizer)
    prepared = prepare(elsewhere, compute=compute, device=device)
    load_adapter(prepared.model, run.adapter)
    return prepared


def base_of_run(folder: Path, device: str = CPU) -> Any | None:
    """The model that a run began with, where its result is another one; None where it is under the adapter."""
    run = RunFolder(folder)
    config = run.finished_config()
    if not config.trains_own_weights:
        return None
    base = _loaded(run, config, run.base_source(config), device=device)[0]
    with_the_runs_tokens(base, run, config, trained=False)
    return base


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
        kept_out = held_out_of(config)
        sources = [config.data, *([kept_out] if isinstance(kept_out, str) else [])]
        known = choices_of(*(read_examples(source, Reading.of(config), BadRows()).items for source in sources))
    return known


def _run(run: RunFolder, compute: str, device: str) -> Opened:
    config = run.finished_config()
    if not config.trains_own_weights and read_facts(run.adapter) is not None:
        return replace(open_adapter(run.adapter, run.base_source(config), compute, device), run=run)
    own, rows = config.trains_own_weights, run.rows()
    model, tokenizer = _loaded(run, config, str(run.model) if own else run.base_source(config), compute, device)
    if not own:
        load_adapter(model, run.adapter)
    date = run.date()
    if date is not None:
        pin_date(tokenizer, date)
    renderer = replace(renderer_of(model, tokenizer, config), system=rows.get("system"))
    return Opened(model, renderer, not own, is_chat(config.template, rows), own, run)


def _loaded(
    run: RunFolder, config: TrainConfig, source: str, compute: str = "auto", device: str = CPU
) -> tuple[Any, Any]:  # fmt: skip
    torch.manual_seed(config.seed)  # as before the run: a classification head may be new
    how, rows = computing_of(run, config, config.storage, compute, device).name, run.rows()
    task, labels = rows.get("problem", config.task), rows["classes"] or None
    return load(source, **config.kept(), compute=how, device=device, task=task, labels=labels)


def refuse_own_weights(source: Path, verb: str) -> None:
    """Raises ModelError where ``source`` is a run whose result is a model, so that it has no adapter to ``verb``."""
    run = RunFolder(source)
    if run.exists and run.result() == run.model:
        raise ModelError(
            f"{source} trained the model's own weights, so there is no adapter to {verb}: {run.model} is a model "
            f"already."
        )
