"""The parts of a run that evaluation starts from, too: the model, and the rows on either side of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from veneer.data.dates import pin_date, pinned_date, today
from veneer.data.formats import Example
from veneer.data.forms import in_form, refuse_unknown_arguments, template_mode
from veneer.data.labels import Renderer, longest_row
from veneer.data.lengths import LongRows
from veneer.data.memory import rows_of
from veneer.data.read import Row
from veneer.data.sources import named_sources
from veneer.device import CPU
from veneer.frozen.compute import Computing
from veneer.generation.likelihood import choices_of
from veneer.models.checkpoint import Checkpoint
from veneer.models.load import load, storage_named
from veneer.models.problems import problem_of
from veneer.runs.computing import (
    began,
    beside_this_machine,
    computing_of,
    computing_of_loaded,
    refuse_other_device,
    said_of_computing,
)
from veneer.runs.folder import RunFolder
from veneer.runs.own_tokens import kept_tokenizer, with_the_runs_tokens
from veneer.runs.rows import problem_asked, read_split
from veneer.runs.start import StartAdapter, start_adapter
from veneer.training.config import TrainConfig


@dataclass
class Prepared:
    """Model and rows of a run; also what evaluation starts from."""

    config: TrainConfig
    model: Any
    tokenizer: Any
    renderer: Renderer
    train: Sequence[Example]
    held_out: Sequence[Example]
    shape: str
    columns: dict[str, str]  # name in the shape → the rows' own, where they differ
    came_loaded: bool = False  # whether the caller brought model and tokenizer, which need not be those of its name
    given: dict[str, list[Row]] = field(default_factory=dict)  # file name → rows to write there: they came in memory
    notes: list[str] = field(default_factory=list)
    start: StartAdapter | None = None  # the adapter that it starts from
    checkpoint: Checkpoint | None = None  # that the model was loaded from; None where it came loaded
    computing: Computing = field(default_factory=lambda: Computing("fp32", ""))

    def facts(self) -> dict[str, Any]:
        """What the rows were, so that the run's model is opened without them."""
        source = self.checkpoint
        return {
            "shape": self.shape,
            "columns": self.columns,
            "train": len(self.train),
            "held_out": len(self.held_out),
            "conversations": any(example.messages for example in self.train),
            "own_validation": True,  # of data sets is looked for, where held_out is auto
            "classes": list(self.renderer.classes),
            **({"problem": self.renderer.problem} if self.renderer.problem != "classification" else {}),
            "choices": [] if self.renderer.classes else choices_of(self.train, self.held_out),
            "date": pinned_date(self.tokenizer),
            "system": self.system,
            **({"began": [one.model_dump() for one in self.start.began()]} if self.start is not None else {}),
            **({"commit": source.name} if source is not None and source.has_revision else {}),
        }

    @property
    def system(self) -> str | None:
        """The system message of the run, or the one that all conversations begin with, where it is one and the same."""
        if self.config.system is not None:
            return self.config.system
        first = {
            message["content"] if (message := example.messages[0])["role"] == "system" else None
            for example in self.train
            if example.messages
        }
        return first.pop() if len(first) == 1 else None


def prepare(
    config: TrainConfig, model: Any = None, tokenizer: Any = None, given: dict[str, list[Row]] | None = None,
    compute: str | None = None, device: str = CPU,
) -> Prepared:  # fmt: skip
    """Load rows and model, and split the rows; everything that can be refused is refused here.

    ``given``: file name → rows that came in memory, which are not in that file yet; ``compute``: the type to measure a
    finished run in, instead of its own; ``device``: where the model is put.
    """
    given = given or {}
    start = start_adapter(config)
    checkpoint = Checkpoint(RunFolder(config.output).base_source(config)) if model is None else None
    own = problem_of(model.config) if model is not None and is_classifier(model) else None
    problem = own if checkpoint is None else problem_asked(config, checkpoint)
    has_classes = checkpoint is None or (start is not None and bool(start.own_classes()))
    rows = read_split(config, given, problem, has_classes=has_classes)
    torch.manual_seed(config.seed if start is None else start.seed(config))  # before a new classification head is made
    if checkpoint is not None:
        classes = rows.classes if start is None else start.classes(rows)
        run, storage, task = (
            RunFolder(config.output),
            storage_named(checkpoint, config.storage),
            rows.problem or config.task,
        )
        how = computing_of(run, config, storage, compute, device)
        model, tokenizer = load(
            checkpoint, **config.kept(), compute=how.name, device=device, task=task, labels=classes or None,
        )  # fmt: skip
        told = said_of_computing(how) + (
            beside_this_machine(how, config, storage, device) if began(run) and not compute else []
        )
        tokenizer = kept_tokenizer(run) or (start and start.tokenizer()) or tokenizer
        if start is not None:
            start.fit(model, tokenizer)
        with_the_runs_tokens(model, run, config)
    else:
        refuse_other_device(model, config.device)
        how = computing_of_loaded(model, config)
        told = said_of_computing(how)
    before = start.facts.prompts.date if start is not None and start.facts is not None else None
    pin_date(tokenizer, RunFolder(config.output).date() or before or today())
    tokenizer, form_notes = tokenizer_of_rows(tokenizer, config, rows.shape, model.config)
    renderer = renderer_of(model, tokenizer, config)
    prepared = Prepared(
        config, model, tokenizer, renderer, rows.train, rows.held_out, rows.shape, rows.columns,
        checkpoint is None, given,
        start=start, checkpoint=checkpoint, computing=how,
    )  # fmt: skip
    prepared.notes += [
        *told,
        *(start.notes(config) if start is not None else []),
        *(checkpoint.notes if checkpoint is not None else []),
        *rows.notes,
        *form_notes,
    ]
    return prepared


def take_given(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """The options, with rows in memory replaced by the name of the run's file that they will be written to; and these
    rows by that name.

    Raises DataError for data that is neither a path or name nor rows.
    """
    folder, given = RunFolder(options.get("output", "")), {}
    for option, file in (("data", folder.data_file), ("held_out", folder.held_out_file)):
        value = named_sources(options.get(option))
        if value is not options.get(option):
            options = {**options, option: value}
        if value is not None and not isinstance(value, str | Path | int | float):
            given[str(file)] = rows_of(value)
            options = {**options, option: str(file)}
    return options, given


class TokenOptions(Protocol):
    """The options that rendering reads: a run's, or those of `veneer inspect`, which shows what a run would learn."""

    @property
    def template(self) -> str: ...
    @property
    def learn(self) -> str: ...
    @property
    def max_length(self) -> int: ...
    @property
    def fold_turns(self) -> bool: ...
    @property
    def long_rows(self) -> LongRows: ...
    @property
    def system(self) -> str | None: ...
    @property
    def template_arguments(self) -> dict[str, Any]: ...


def renderer_of(model: Any, tokenizer: Any, options: TokenOptions | None = None) -> Renderer:
    """How examples become this model's tokens, as ``options`` say, or by a run's defaults."""
    return renderer_by_config(model.config, is_classifier(model), tokenizer, options)


def tokenizer_of_rows(tokenizer: Any, options: TokenOptions, shape: str, config: Any) -> tuple[Any, list[str]]:
    """The tokenizer with the chat template that ``options`` name, or that rows of this ``shape`` need, and sentences
    about it; ``config``: transformers' of the model.

    Raises DataError for a template or an argument that does not exist.
    """
    if getattr(config, "is_encoder_decoder", False):
        return tokenizer, []
    tokenizer, notes = in_form(tokenizer, options.template, shape)
    refuse_unknown_arguments(tokenizer, options.template_arguments)
    return tokenizer, notes


def is_classifier(model: Any) -> bool:
    """Whether a loaded model chooses among classes."""
    return type(model).__name__.endswith("ForSequenceClassification")


def renderer_by_config(config: Any, classified: bool, tokenizer: Any, options: TokenOptions | None = None) -> Renderer:
    """The same for a model that is not loaded, with transformers' ``config`` of it."""
    names = config.id2label if classified else {}
    problem = problem_of(config) if classified else "classification"
    fields = TrainConfig.model_fields
    template, learn, longest, fold, arguments, long_rows, system = (
        getattr(options, name) if options is not None else fields[name].default
        for name in ("template", "learn", "max_length", "fold_turns", "template_arguments", "long_rows", "system")
    )
    return Renderer(
        tokenizer, template_mode(template), learn, longest_row(longest, config),
        seq2seq=bool(getattr(config, "is_encoder_decoder", False)),
        classes=tuple(names[i] for i in sorted(names)), problem=problem, fold_turns=fold, arguments=arguments,
        long_rows=long_rows, system=system,
    )  # fmt: skip
