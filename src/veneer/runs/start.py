"""The adapter that a run starts from: in the folder that the user names, or in the run's own copy of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from veneer.data.formats import labels_in
from veneer.errors import AdapterFileError, DataError, ModelError, did_you_mean
from veneer.files import atomic_folder
from veneer.models.checkpoint import Checkpoint
from veneer.models.own_tokenizer import tokenizer_in
from veneer.runs.adapter import give_tokens, named_base, task_by_peft
from veneer.runs.facts import FACTS_NAME, Began, Facts, read_facts
from veneer.runs.folder import RunFolder
from veneer.runs.rows import SplitRows
from veneer.training.config import TrainConfig
from veneer.updates.adapter_file import WEIGHTS_NAME
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.layers import LowRank
from veneer.updates.load_adapter import load_adapter
from veneer.updates.peft_config import CONFIG_NAME, base_named, from_peft, kept_triplets, read_fields
from veneer.updates.record import active_allocator, adapters_of, updates_of
from veneer.updates.trainable import trainable


@dataclass(frozen=True)
class StartAdapter:
    """``called``: the run or folder that the user names; ``folder``: PEFT's, there or in the new run."""

    called: str
    folder: Path
    update: LoRA | AdaLoRA
    facts: Facts | None  # of veneer.json; None for one of PEFT
    copied: bool = False  # whether ``folder`` is in the new run

    @classmethod
    def read(cls, called: str, copied: Path | None = None) -> StartAdapter:
        """Raises AdapterFileError where there is no adapter, or one whose ranks are still to be given out; ModelError
        and TrainingError for a run that has none."""
        folder = copied or _adapter_of(called)
        start = cls(called, folder, from_peft(folder), read_facts(folder), copied is not None)
        start._refuse_unsettled()
        return start

    @property
    def method(self) -> str:
        return "adalora" if isinstance(self.update, AdaLoRA) else "lora"

    @property
    def name(self) -> str:
        """What it is called beside the path: of a run the run's name."""
        path = Path(self.called)
        if path.name in ("", "..", RunFolder.adapter):
            path = path.resolve()
        return path.parent.name if path.name == RunFolder.adapter else path.name

    def base(self) -> str | None:
        """What to load as its base, by its run or its config; None where neither names one."""
        run = RunFolder(self.called)
        return run.base_source(run.config()) if run.exists else base_named(read_fields(self.folder))

    def base_here(self) -> str:
        """The same. Raises AdapterFileError where none is named, or a place that is not here."""
        run = RunFolder(self.called)
        return run.base_source(run.config()) if run.exists else named_base(self.folder, self.facts)

    def began(self) -> list[Began]:
        """What a run that starts from it began with, the first adapter first."""
        facts = self.facts
        if facts is None:
            return [Began(adapter=self.name)]
        return [*facts.began, Began(adapter=self.name, steps=facts.steps, rows=facts.rows.train)]

    def seed(self, config: TrainConfig) -> int:
        """The seed that made what the base lacks, such as a new head."""
        return config.seed if self.facts is None else self.facts.seed

    def own_classes(self) -> list[str]:
        """Its classes by their ids; none where it is no classifier."""
        return self.facts.classes if self.facts is not None else task_by_peft(self.folder).get("labels", [])

    def classes(self, rows: SplitRows) -> list[str]:
        """`own_classes`. Raises DataError for rows of other labels."""
        named, classes = self.facts is not None, self.own_classes()
        for row in chain(rows.train, rows.held_out) if classes and rows.problem != "regression" else ():
            label = next((name for name in labels_in(row) if name not in classes), None)
            if not row.messages and label is not None:
                todo = "leave such rows out, or train a new adapter, without this one, on all of them"
                if not named:
                    todo = "it does not say what they are called, so number the rows' labels like that"
                raise DataError(
                    f"{row.where} has the label {label!r}, and the classes of {self.called} are {', '.join(classes)}; "
                    f"{todo}.{did_you_mean(label, classes) if named else ''}"
                )
        return classes

    def tokenizer(self) -> Any | None:
        """Its own; None where it is the base's, or was copied into the run as the run's own."""
        own = self.facts is not None and self.facts.own_tokenizer and not self.copied
        return tokenizer_in(self.folder) if own else None

    def fit(self, model: Any, tokenizer: Any) -> None:
        """Give base and tokenizer what they had under the adapter. Raises ModelError where it is another base."""
        if self.facts is None:
            return
        give_tokens(model, self.folder, self.facts)
        tokenizer.chat_template = self.facts.prompts.chat_template
        base, kind, count = self.facts.base, type(model).__name__, trainable(model).base_parameters
        if (kind, count) != (base.kind, base.parameters):
            raise ModelError(
                f"{model.name_or_path} is a {kind} of {count:,} parameters, and {self.called} was trained over "
                f"{base.name}, a {base.kind} of {base.parameters:,}; give that one as model."
            )

    def put_on(self, model: Any, dropout: float) -> None:
        """Attach it, trainable. AdaLoRA's ranks stay as they are. Raises AdapterFileError where it does not fit."""
        load_adapter(model, self.folder, trainable=True)
        allocator, record = active_allocator(model), adapters_of(model)
        if allocator is not None and not allocator.fixed:
            allocator.fix(allocator.kept)
        (name,) = record.active
        record.configs[name] = record.configs[name].model_copy(update={"dropout": dropout})
        for update in updates_of(model, name).values():
            if isinstance(update, LowRank):
                update.dropout = dropout

    def keep(self, run: RunFolder) -> None:
        """Copy it into the run's folder, so that the run can do without the one that it started from."""
        with atomic_folder(run.start) as temporary:
            for file in (CONFIG_NAME, WEIGHTS_NAME, FACTS_NAME):
                if (self.folder / file).is_file():
                    shutil.copy(self.folder / file, temporary)

    def notes(self, config: TrainConfig) -> list[str]:
        """What the user should know, a sentence each."""
        update = self.update
        rank = f"initial_rank {update.initial_rank}" if isinstance(update, AdaLoRA) else f"rank {update.rank}"
        stay = "; the ranks stay as they are" if isinstance(update, AdaLoRA) else ""
        notes = [f"Starts from {started_from(self.began()[-1], self.called)}: method {self.method}, {rank}{stay}."]
        base = None if self.copied else self.base()
        if base is not None and base != config.model and not _is_here(base):
            notes.append(f"Its base, {base}, is not here; {config.model} is of the same shapes, and is used instead.")
        before = config.storage if self.facts is None else self.facts.kept["storage"]
        if before != config.storage:
            notes.append(
                f"{self.called} was trained over a base in {before}, and goes on over one in {config.storage}."
            )
        return notes

    def _refuse_unsettled(self) -> None:
        update = self.update
        if not isinstance(update, AdaLoRA) or kept_triplets(self.folder):
            return
        assert update.initial_rank is not None
        if update.initial_rank > update.target_rank:
            raise AdapterFileError(
                f"The ranks of {self.called}, an AdaLoRA adapter, were not given out before it was saved, and a new "
                f"run cannot go on within their schedule; make a plain LoRA of it, veneer export {self.folder} PLAIN, "
                f"and start from that."
            )


def start_adapter(config: TrainConfig) -> StartAdapter | None:
    """The adapter that a run starts from, as its own copy where the run has begun; None for a run without one."""
    if config.adapter is None:
        return None
    run = RunFolder(config.output)
    begun = bool(config.output) and run.exists and run.start.is_dir()
    return StartAdapter.read(config.adapter, run.start if begun else None)


def planned_update(config: TrainConfig) -> dict[str, LoRA]:
    """What `plan` takes of an AdaLoRA adapter to start from: a LoRA of the ranks that it has, as ``update``; nothing
    where the options describe the update."""
    start = start_adapter(config)
    if start is None or not isinstance(start.update, AdaLoRA):
        return {}
    update, flags = start.update, kept_triplets(start.folder)
    shared = {"train_also": update.train_also, "new_tokens": update.new_tokens, "dropout": config.dropout}
    if not flags:
        return {"update": LoRA(rank=update.initial_rank, targets=update.targets, exclude=update.exclude, **shared)}
    ranks = {path: sum(kept) for path, kept in flags.items() if any(kept)}
    return {"update": LoRA(rank_pattern=ranks, targets=list(ranks), **shared)}


def started_from(began: Began, called: str = "") -> str:
    """An adapter that a run started from, for a person: "first (40 steps on 38 rows)"."""
    name = called or began.adapter
    return name if began.steps is None else f"{name} ({began.steps:,} steps on {began.rows:,} rows)"


def _is_here(base: str) -> bool:
    try:
        Checkpoint(base)
    except ModelError:
        return False
    return True


def _adapter_of(called: str) -> Path:
    """The adapter's folder of a run, or the folder itself."""
    path = Path(called).expanduser()
    run = RunFolder(path)
    if not run.exists:
        return path
    if run.config().trains_own_weights:
        raise ModelError(
            f"{called} trained the model's own weights, so it has no adapter to start from; train its model: --model "
            f"{run.model}"
        )
    run.finished_config()
    return run.adapter
