"""The rows of a run, for which its model's weights are not needed: read and split, rendered as tokens, put into steps.

A run begins with them, and so does its plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, TypeVar

from veneer.data.bad import BadRows
from veneer.data.classes import head_for, weights_of
from veneer.data.columns import SHAPES, Reading
from veneer.data.folders import own_validation, splits_read
from veneer.data.formats import Example, Examples, class_of, counted_rows, joined, to_examples
from veneer.data.forms import template_mode
from veneer.data.kept import Kept, those_of
from veneer.data.labels import Renderer
from veneer.data.read import Row, read_rows, set_validation
from veneer.data.report import Report
from veneer.data.sources import refuse_weights, sources_of, weighted
from veneer.data.split import split
from veneer.data.token_rows import TokenRows, Tokens, lengths_of
from veneer.device import AUTO, is_host
from veneer.errors import ConfigError, DataError
from veneer.frozen.text_part import text_config_of
from veneer.models.checkpoint import Checkpoint
from veneer.models.problems import Problem
from veneer.runs.folder import RunFolder
from veneer.runs.objective import in_tokens, notes_of, objective_of, refuse_judged
from veneer.training.automatic import WIDTH, Size, automatic
from veneer.training.batches import Batches
from veneer.training.config import RunConfig, TrainConfig
from veneer.training.loss import tokens_gone_through

T = TypeVar("T")
Given = Mapping[str, Sequence[Row]]  # file name → rows that came in memory, which are not in that file yet

_NAMED = ("classification", "multi-label")  # the problems whose labels are names
_SHARE = 0.1  # of rows that bring none for validation
_ROW = 300  # bytes of the memory for each row, whose text and tokens are in a file where they are many


@dataclass(frozen=True)
class SplitRows:
    """The rows on either side of the split."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    shape: str
    classes: list[str]  # of a classifier's new head, else none
    problem: Problem | None  # what a classifier is asked; None for a model that writes text
    notes: list[str]  # what the user should know of the rows, as sentences
    columns: dict[str, str]  # name in the shape → the rows' own, where they differ


def problem_asked(config: TrainConfig, checkpoint: Checkpoint) -> Problem | Literal["auto"] | None:
    """What a model is asked that gets a head for it, as wanted or since it writes no text; auto: a class or several
    labels, by its rows. None for one that writes text."""
    if config.task == "multi-label" or config.task == "regression":
        return config.task
    classifies = config.task == "classification" or (config.task == "auto" and not checkpoint.generates_text)
    return "auto" if classifies else None


def read_split(
    config: TrainConfig, given: Given, problem: Problem | Literal["auto"] | None = None, *, has_classes: bool = False
) -> SplitRows:  # fmt: skip
    """The rows that ``config`` names; ``problem``: what a classifier is asked, so that their answers are its classes,
    except for one that ``has_classes`` already.

    Raises DataError where they cannot be read or split, or make no classes.
    """
    bad, kept_out = BadRows(), held_out_of(config)
    reading = replace(Reading.of(config), numbers=problem == "regression")
    examples = read_examples(config.data, reading, bad, given)
    train: Sequence[Example] = examples.items
    held_out: Sequence[Example] = []
    shapes = examples.shape
    notes = [*(splits_read(source.name) for source in sources_of(config.data)), *examples.notes()]
    if isinstance(kept_out, str):
        like = examples.shape if examples.shape in SHAPES else "auto"
        reading = Reading(examples.columns, like, asked=False, numbers=reading.numbers)
        others = read_examples(kept_out, reading, bad, given)
        held_out, shapes = others.items, f"{shapes} {others.shape}"
        notes += others.left_out()
        if config.held_out == "auto" and not all(own_validation(source.name) for source in sources_of(config.data)):
            notes.append(
                f"Held out are the rows of {kept_out}, which come with the others; held_out decides otherwise."
            )
    if config.bad_rows == "stop":
        bad.refuse()
    lists = (example for example in chain(train, held_out) if example.labels is not None)
    problem = problem_settled(problem, next(lists, None) if "text/labels" in shapes else None, has_classes)
    if config.system:
        notes.append(_of_system(config, train, held_out))
    notes += bad.sentences()
    if kept_out and not isinstance(kept_out, str):
        train, held_out, more = split(examples.items, kept_out, config.seed, classes=problem in _NAMED)
        notes += more
    if problem is not None:
        refuse_judged(chain(train, held_out), "a classifier")
        unlabelled = [example.where for example in chain(train, held_out) if not _has_label(example)]
        train, held_out = (
            those_of(side, [number for number, example in enumerate(side) if _has_label(example)])
            for side in (train, held_out)
        )
        notes += [f"{counted_rows(unlabelled)} left out: the answer, which is the class, is empty."] * bool(unlabelled)
    classes, said = ([], "") if problem is None or has_classes else head_for(problem, train, held_out)
    train = weighted(train, config.seed)
    notes = list(filter(None, [*notes, said]))
    return SplitRows(train, held_out, examples.shape, classes, problem, notes, examples.columns)


def _has_label(example: Example) -> bool:
    return example.labels is not None or bool(class_of(example))


def problem_settled(
    problem: Problem | Literal["auto"] | None, several: Example | None, has_classes: bool
) -> Problem | None:  # fmt: skip
    """What a classifier is asked, where ``problem`` leaves it to the rows, of which one has ``several`` labels or none
    has; one that ``has_classes`` already chooses one of them. Raises DataError for such a row where nothing can be made
    of its labels."""
    if problem == "auto":
        problem = "classification" if has_classes or several is None else "multi-label"
    if several is not None and problem != "multi-label":
        why = {
            None: "a model that writes text has no place for it; task: multi-label gives it a head for labels",
            "classification": "the model chooses one class; train a new one with task: multi-label",
            "regression": "task: regression learns one number a row",
        }[problem]
        raise DataError(f"{several.where} has a list of labels, and {why}.")
    return problem


def _of_system(config: TrainConfig, *sides: Sequence[Example]) -> str:
    """What to say of rows with a system message of their own. Raises DataError where the run's would go nowhere."""
    talks, own = False, []
    for example in chain.from_iterable(sides):
        talks = talks or bool(example.messages)
        if example.messages and example.messages[0]["role"] in ("system", "developer"):
            own.append(example.where)
    if not talks and template_mode(config.template) != "chat":
        raise DataError(
            f"system goes before conversations, and there is none among the rows ({sides[0][0].where}); put prompts "
            f"into the chat template (template: chat), or leave system out."
        )
    return f"{counted_rows(own)} with a system message of their own, which stays." if own else ""


def held_out_of(config: TrainConfig) -> float | str:
    """A share or number of the rows, or other rows by name: of ``auto`` the folders' and data sets' own validation
    rows, or a share.

    A run that began under a release that did not look for those of data sets goes on without them. Raises DataError for
    sources that say how often their rows are learned, or cannot be read.
    """
    if isinstance(config.held_out, str) and config.held_out != "auto":
        refuse_weights(config.held_out, "where rows are held out")
    if config.held_out != "auto":
        return config.held_out
    run = RunFolder(config.output) if config.output else None
    known = run.rows() if run is not None and run.exists and run.rows_file.is_file() else None
    of_sets = known is None or known.get("own_validation", False)
    sources = [source.name for source in sources_of(config.data)]
    own = [name for one in sources if (name := own_validation(one) or (set_validation(one) if of_sets else None))]
    return ",".join(own) or _SHARE


def read_examples(data: str, reading: Reading, bad: BadRows, given: Given | None = None) -> Examples:
    """The examples of all the sources that ``data`` names, each by its own columns; rows that cannot be used go to
    ``bad``. Raises DataError where a source cannot be read, or has no row that can be used."""
    parts = []
    for source in sources_of(data):
        rows = (given or {}).get(source.name) or read_rows(source.name, bad)
        part = to_examples(rows, reading, bad)
        if source.times != 1:
            part = replace(part, items=Kept(replace(example, times=source.times) for example in part.items))
        parts.append(part)
    return joined(parts)


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
    bad: BadRows = field(default_factory=BadRows)  # that the template refuses, and that are left out

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
        cut = [sentence for report in self.reports for sentence in report.sentences(max_length)]
        return [*self.notes, *cut, *self.bad.sentences()]

    def placed_on(self, asked: TrainConfig, device: str) -> Steps:
        """The same, ``device`` being the one that auto stands for in what was ``asked``. The CPU is not noted."""
        if asked.device != AUTO or is_host(device):
            return self
        chosen = {**self.chosen, "device": device}
        return replace(self, chosen=chosen, config=RunConfig.of(asked, {"objective": self.config.objective, **chosen}))

    def computed_in(self, asked: TrainConfig, name: str) -> Steps:
        """The same, ``name`` being the type of computing that auto stands for in what was ``asked``."""
        chosen = {**self.chosen, "compute": name}
        return replace(self, chosen=chosen, config=RunConfig.of(asked, {"objective": self.config.objective, **chosen}))

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
    bad = BadRows() if asked.bad_rows == "leave-out" else None
    objective = objective_of(asked, train, held_out, renderer.kind)
    if asked.label_smoothing and renderer.problem != "classification":
        raise ConfigError(f"label_smoothing spreads a class over the others, and task: {renderer.problem} has none.")
    rows, report = in_tokens(renderer, train, objective, watched=watched, bad=bad)
    others, more = (
        in_tokens(renderer, held_out, objective, len(rows), watched, bad) if held_out else (TokenRows(), None)
    )
    batches = Batches(rows, asked.batch_size, asked.seed)
    chosen = automatic(asked, Size(width_of(model), batches.per_epoch, len(others), renderer.kind, objective))
    if asked.objective == "auto" and objective != "likelihood":
        chosen = {"objective": objective, **chosen}
    notes = notes_of(asked, objective, train, held_out)
    if asked.class_weights != "none":
        if not renderer.classes or renderer.problem == "regression":
            what = renderer.problem if renderer.classes else renderer.kind
            raise ConfigError(f"class_weights weighs the classes of a classifier, and this model is {what}.")
        chosen["class_weights"], said = weights_of(
            asked.class_weights, renderer.classes, train, several=renderer.problem == "multi-label"
        )
        notes.append(said)
    chosen |= {name: number for name, number in kept.items() if name in chosen}
    reports = [report] if more is None else [report, more]
    config = RunConfig.of(asked, {"objective": objective, **chosen})
    return Steps(rows, others, reports, batches, config, chosen, notes, bad or BadRows())
