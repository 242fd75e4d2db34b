"""The rows of a run, for which its model's weights are not needed: read and split, rendered as tokens, put into steps.

A run begins with them, and so does its plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from veneer.data.classes import classes_of, counted_classes
from veneer.data.formats import Example, class_of, counted_rows, to_examples
from veneer.data.kept import those_of
from veneer.data.labels import Renderer
from veneer.data.read import Row, read_rows
from veneer.data.report import Report
from veneer.data.split import split
from veneer.data.token_rows import TokenRows, Tokens, lengths_of
from veneer.frozen.text_part import text_config_of
from veneer.models.checkpoint import Checkpoint
from veneer.runs.objective import in_tokens, notes_of, objective_of, refuse_judged
from veneer.training.automatic import WIDTH, Size, automatic
from veneer.training.batches import Batches
from veneer.training.config import RunConfig, TrainConfig
from veneer.training.loss import tokens_gone_through

T = TypeVar("T")
Given = Mapping[str, Sequence[Row]]  # file name → rows that came in memory, which are not in that file yet

_ROW = 300  # bytes of the memory for each row, whose text and tokens are in a file where they are many


@dataclass(frozen=True)
class SplitRows:
    """The rows on either side of the split."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    shape: str
    classes: list[str]  # of a classifier's new head, else none
    notes: list[str]  # what the user should know of the rows, as sentences


def classifies(config: TrainConfig, checkpoint: Checkpoint) -> bool:
    """Whether the model gets a head of classes: asked for, or since it writes no text."""
    return config.task == "classification" or (config.task == "auto" and not checkpoint.generates_text)


def read_split(
    config: TrainConfig, given: Given, *, classified: bool = False, has_classes: bool = False
) -> SplitRows:  # fmt: skip
    """The rows that ``config`` names; ``classified``: for a classifier, so that their answers are its classes, except
    for one that ``has_classes`` already.

    Raises DataError where they cannot be read or split, or make no classes.
    """
    examples = to_examples(_rows(config.data, given))
    train, notes = examples.items, examples.notes()
    held_out: Sequence[Example] = []
    if isinstance(config.held_out, str):
        others = to_examples(_rows(config.held_out, given))
        held_out = others.items
        notes += others.left_out()
    elif config.held_out:
        train, held_out, more = split(examples.items, config.held_out, config.seed, classes=classified)
        notes += more
    if classified:
        refuse_judged(chain(train, held_out), "a classifier")
        unlabelled = [example.where for example in chain(train, held_out) if not class_of(example)]
        train, held_out = (
            those_of(side, [number for number, example in enumerate(side) if class_of(example)])
            for side in (train, held_out)
        )
        notes += [f"{counted_rows(unlabelled)} left out: the answer, which is the class, is empty."] * bool(unlabelled)
    classes = classes_of(train, held_out) if classified and not has_classes else {}
    notes += [f"{len(classes)} classes: {counted_classes(classes)}."] if classes else []
    return SplitRows(train, held_out, examples.shape, sorted(classes), notes)


def _rows(source: str, given: Given) -> Sequence[Row]:
    return given[source] if source in given else read_rows(source)


@dataclass(frozen=True)
class Work:
    """What the steps of a run pass through the model."""

    largest: list[Tokens]  # the rows of the step with the most tokens in a pass
    steps: float  # the tokens of all steps, counted in steps of that one's size
    reference: float  # and those whose reference is computed, once, before


@dataclass(frozen=True)
class Steps:
    """The rows as tokens, and which of them a step takes."""

    rows: Sequence[Tokens]
    held_out: Sequence[Tokens]
    reports: list[Report]  # what became of rows on their way to tokens
    batches: Batches
    config: RunConfig  # what was asked, with the numbers that auto stands for
    chosen: dict[str, Any]  # those numbers, by option
    notes: list[str] = field(default_factory=list)  # what the objective does to the rows, as sentences

    @property
    def total(self) -> int:
        """Optimizer steps."""
        return self.config.steps or max(1, math.ceil(self.config.epochs * self.batches.per_epoch))

    @property
    def memory(self) -> int:
        """Bytes that the rows take in memory: where each is, how long it is and which step takes it."""
        return _ROW * (len(self.rows) + len(self.held_out))

    def counts(self) -> str:
        return (
            f"{len(self.rows):,} rows to train on, {len(self.held_out):,} held out; {self.total:,} steps of "
            f"{self.config.batch_size}"
        )

    def sentences(self, max_length: int) -> list[str]:
        """What the user should know of rows that were cut or left out."""
        return self.notes + [sentence for report in self.reports for sentence in report.sentences(max_length)]

    def work(self, kind: str, packed: bool) -> Work:
        """Over all epochs, for each puts other rows together; ``packed``: no token is padding."""
        largest, most, of_that, tokens, referred = 0, 0, 0, 0, 0
        for step in range(self.total):
            passes = [tokens_gone_through(some, kind, packed) for some in self._in_parts(self.batches.lengths(step))]
            tokens += sum(passes)
            referred += sum(passes) if step < self.batches.per_epoch else 0
            if max(passes) > most:
                largest, most, of_that = step, max(passes), sum(passes)
        referred += int(lengths_of(self.held_out).sum())
        return Work(self.batches.rows(largest), tokens / of_that, referred / of_that)

    def passes(self, step: int) -> Iterator[list[Tokens]]:
        """The rows of a step in the parts that go through the model together."""
        return self._in_parts(self.batches.rows(step))

    def _in_parts(self, rows: list[T]) -> Iterator[list[T]]:
        size = self.config.micro_batch_size or self.config.batch_size
        return (rows[start : start + size] for start in range(0, len(rows), size))


def width_of(model: Any) -> int:
    """How wide a model's hidden states are, by transformers' config of it."""
    return int(getattr(text_config_of(model), "hidden_size", None) or WIDTH)


def in_steps(
    renderer: Renderer,
    train: Sequence[Example],
    held_out: Sequence[Example],
    asked: TrainConfig,
    model: Any,
    kept: dict[str, Any],
    watched: Callable[[Sequence[Example]], Iterable[Example]] = iter,
) -> Steps:
    """``model``: transformers' config of it; ``kept``: what was chosen when the run began, for one that goes on;
    ``watched``: see `Renderer.all`.

    Raises DataError where no row on one side has a token to learn.
    """
    objective = objective_of(asked, train, held_out, renderer.kind)
    rows, report = in_tokens(renderer, train, objective, watched=watched)
    others, more = in_tokens(renderer, held_out, objective, len(rows), watched) if held_out else (TokenRows(), None)
    batches = Batches(rows, asked.batch_size, asked.seed)
    chosen = automatic(asked, Size(width_of(model), batches.per_epoch, len(others), renderer.kind, objective))
    if asked.objective == "auto" and objective != "likelihood":
        chosen = {"objective": objective, **chosen}
    chosen |= {name: number for name, number in kept.items() if name in chosen}
    notes = notes_of(asked, objective, train, held_out)
    reports = [report] if more is None else [report, more]
    return Steps(rows, others, reports, batches, RunConfig.of(asked, {"objective": objective, **chosen}), chosen, notes)
