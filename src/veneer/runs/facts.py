"""``veneer.json`` in an adapter's folder, beside PEFT's files: what else it takes to use the adapter as it was trained;
and in the folder of a model whose own weights were trained.

The names of its classes or labels, how a prompt is rendered and on which date, how its base was kept; and, for the
model card, what it was trained on and what was measured. No row and no path of a machine is in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veneer.data.dates import pinned_date
from veneer.data.forms import template_mode
from veneer.data.lengths import LongRows
from veneer.documents import read_json
from veneer.errors import AdapterFileError
from veneer.files import write_text
from veneer.models.origin import bare_name, license_of
from veneer.updates.trainable import trainable

if TYPE_CHECKING:
    from veneer.runs.prepare import Prepared

FACTS_NAME = "veneer.json"
CARD_NAME = "README.md"
VERSION = 3  # that is read; a file is of the first version that has all that is in it, which earlier releases read
_PATHS = {"model", "data", "output", "held_out", "adapter"}  # options that name places of one machine

Before = tuple[float | None, float | None]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(_Part):
    """What is known of the base; adapter_config.json says where it is."""

    name: str  # a hub id, a packaged model's name, or the last part of a path
    kind: str  # transformers' class
    parameters: int
    tokens: int  # rows of its input embedding
    license: str | None = None


class Prompts(_Part):
    """How rows and questions become tokens."""

    template: Literal["auto", "chat", "plain"]
    learn: Literal["answer", "last", "all"]
    max_length: int
    chat: bool  # whether a question is asked in the chat template
    chat_template: str | dict[str, str] | None
    system: str | None  # the system message of all conversations
    date: str | None  # what the template prints as today, ISO
    template_arguments: dict[str, Any] = Field(default_factory=dict)  # of the template
    fold_turns: bool = False  # whether the system message goes into the first user turn
    long_rows: LongRows = "auto"  # what became of rows of more than max_length tokens


class Rows(_Part):
    """What the rows were, and how many."""

    shape: str
    train: int
    held_out: int


class Began(_Part):
    """An adapter that a run started from."""

    adapter: str  # its name, without a path
    steps: int | None = None  # None where it has no veneer.json
    rows: int | None = None  # that it was trained on


class Facts(_Part):
    """What veneer.json says. ``scores``: a measure's name → (base, adapter), losses in nats."""

    version: int = 1
    task: Literal["causal", "seq2seq", "classification", "multi-label", "regression"]
    classes: list[str]  # by their ids
    choices: list[str] = Field(default_factory=list)  # the few answers of the rows, as they follow a prompt
    base: Base
    kept: dict[str, Any]  # storage, block_size, double_quantisation; compute, where that is not fp32
    prompts: Prompts
    own_tokenizer: bool  # whether the tokenizer's files are in the folder, since they are not the base's
    seed: int  # of what the base lacks: a new classification head
    method: str
    options: dict[str, Any]  # those that are not the defaults
    rows: Rows
    steps: int
    began: list[Began] = Field(default_factory=list)  # the adapters it started from, the first one first
    scores: dict[str, Before] = Field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `veneer.json` into an adapter's or a model's folder. Raises OSError."""
        write_text(folder / FACTS_NAME, json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n")

    def as_json(self) -> dict[str, Any]:
        """What the file holds."""
        version = 3 if self.task in ("multi-label", "regression") else 2 if self.began else 1
        values = {**self.model_dump(), "version": version}
        if not self.began:
            del values["began"]
        return values


def facts_of(prepared: Prepared, steps: int, losses: Before, *, own_tokenizer: bool) -> Facts:
    """The facts of a run that ends after so many ``steps``; ``losses``: of held-out rows, before and after."""
    config, model, tokenizer, renderer = prepared.config, prepared.model, prepared.tokenizer, prepared.renderer
    rows, start = prepared.facts(), prepared.start
    if config.class_weights != "none" or (config.objective != "likelihood" and prepared.train[0].is_judged):
        losses = None, None  # of a preference, or of weighted classes: none that another model could be compared by
    elif start is not None:  # what was measured first was no base
        losses = None, losses[1]
    options = {name: value for name, value in config.changed().items() if name not in _PATHS}
    options |= {"columns": rows["columns"]} if rows["columns"] else {}  # as they were found, where none were named
    return Facts(
        task=renderer.problem if renderer.classes else renderer.kind,
        classes=list(renderer.classes),
        choices=rows["choices"],
        base=_base(model),
        kept=config.kept() | ({} if (compute := prepared.computing.name) == "fp32" else {"compute": compute}),
        prompts=Prompts(
            template=template_mode(config.template), learn=config.learn, max_length=config.max_length,
            chat=is_chat(config.template, rows), chat_template=tokenizer.chat_template, system=rows["system"],
            date=pinned_date(tokenizer), template_arguments=config.template_arguments, fold_turns=config.fold_turns,
            long_rows=config.long_rows,
        ),
        own_tokenizer=own_tokenizer,
        seed=config.seed if start is None else start.seed(config),
        method=config.method,
        options=options,
        rows=Rows(**{name: rows[name] for name in Rows.model_fields}),
        steps=steps,
        began=[] if start is None else start.began(),
        scores={} if losses[1] is None or (losses[0] is None and start is None) else {"loss": losses},
    )  # fmt: skip


def is_chat(template: str, rows: dict[str, Any]) -> bool:
    """Whether a run's questions are asked in the chat template: as its rows were, by what rows.json says of them."""
    return template_mode(template) == "chat" or bool(rows["conversations"])


def _base(model: Any) -> Base:
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return Base(
        name=bare_name(name), kind=type(model).__name__, parameters=trainable(model).base_parameters,
        tokens=model.get_input_embeddings().weight.shape[0], license=license_of(name),
    )  # fmt: skip


def read_facts(folder: Path) -> Facts | None:
    """What `veneer.json` of an adapter's folder says; None where there is none, as in PEFT's own folders.

    Raises AdapterFileError for a damaged file, and for one of a later version of Veneer.
    """
    path = folder / FACTS_NAME
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        later = isinstance(values, dict) and isinstance(values.get("version"), int) and values["version"] > VERSION
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON: {error}.") from None
    if later:
        raise AdapterFileError(f"{path} is of version {values['version']}, which a later Veneer wrote; update Veneer.")
    try:
        return Facts.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise AdapterFileError(
            f"{path} is damaged ({where}: {first['msg']}); copy it again from the run's adapter folder, or delete it "
            f"to load the adapter without its classes and its prompt's form."
        ) from None
