"""Base and adapter side by side on held-out rows: loss, perplexity, choice accuracy, exact match, labels, numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.table import Table

from veneer.data.formats import Example, class_of, labels_in
from veneer.data.known_tokens import known_pad, refuse_unknown_tokens_in
from veneer.data.labels import Renderer
from veneer.data.metrics import Metric
from veneer.data.pairs import Pair, to_pairs
from veneer.data.problems import number_of
from veneer.evaluation.answers import Answered
from veneer.evaluation.classes import HEAD, Classes
from veneer.evaluation.numbers import NumberScores
from veneer.generation.answers import measured_answers
from veneer.generation.config import SamplingOptions
from veneer.generation.generate import exact_matches
from veneer.generation.likelihood import accuracy, choices_of, labels_said, likeliest, numbers_said
from veneer.generation.own_settings import not_followed
from veneer.notebook import html_table
from veneer.runs.objective import good_ones
from veneer.runs.opened import as_it_was
from veneer.training.batches import by_length
from veneer.training.loss import Loss

_NO_MATCH = (
    "The answers are not a few labels, and whether they are given word for word was not measured: --exact-match "
    "generates one for every row, by base and adapter."
)
_JUDGED = (
    "Exact match was not measured: in rows with preferences an answer is better or worse, and not the one right answer."
)


@dataclass(frozen=True)
class Scores:
    """What was measured; None where it does not apply to the rows or was not asked for."""

    loss: float  # mean over learned tokens, nats; of several labels over rows and labels; of numbers squared errors
    perplexity: float | None  # None of labels that a row may have several of, and of numbers
    choice_accuracy: float | None = None  # share of rows
    exact_match: float | None = None  # share of rows; of several labels, of those with all their labels and no other
    classes: Classes | None = None  # each label by itself
    macro_f1: float | None = None  # mean of the labels
    preferred: float | None = None  # share of pairs whose chosen answer is likelier than the rejected one
    micro_f1: float | None = None  # over all rows and labels, where a row may have several
    numbers: NumberScores | None = None  # of a model that gives numbers
    metrics: dict[str, float] = field(default_factory=dict)  # asked for, of an answer to every row


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `evaluate` measured; at a prompt one line, in a notebook a table."""

    rows: int
    choices: list[str]
    base: Scores
    adapter: Scores
    examples: list[Answered] = field(default_factory=list)
    data: str | None = None  # other rows than the run's held-out ones
    trained: str = "adapter"  # what is beside the base; or the model, where its own weights were trained
    lower_is_better: list[str] = field(default_factory=list)  # of the metrics
    note: str = ""  # what a person should know of the files that were not written

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["note"]
        return values

    def table(self) -> Table:
        table = Table(title=self._title(), title_justify="left")
        for name in self._header():
            table.add_column(name, justify="left" if not name else "right")
        for line in self._lines():
            table.add_row(*line)
        return table

    def tables(self) -> list[Table]:
        """The scores; and where there are labels, what was trained label by label, and its confusion matrix."""
        classes, tables = self.adapter.classes, [self.table()]
        if classes is not None:
            confusion = (
                f"confusion matrix, {self.trained}: a row for each right label, a column for each chosen one",
                ("", *(score.label.strip() for score in classes.scores)),
                classes.confusion_lines(),
            )
            for title, head, lines in (
                (f"each label, {self.trained}", HEAD, classes.lines()), *([confusion] if classes.confusion else []),
            ):  # fmt: skip
                table = Table(title=title, title_justify="left")
                for place, name in enumerate(head):
                    table.add_column(name, justify="right" if place else "left")
                for line in lines:
                    table.add_row(*line)
                tables.append(table)
        return tables

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {before} → {after}" for name, before, after in self._lines())
        return f"Comparison({self._title()}, base → {self.trained}: {scores})"

    def _repr_html_(self) -> str:
        return html_table(self._header(), self._lines(), self._title())

    def _title(self) -> str:
        return f"{self.rows} held-out rows"

    def _header(self) -> tuple[str, str, str]:
        return "", "base", self.trained

    def _lines(self) -> list[tuple[str, str, str]]:
        """(what was measured, of the base, of what was trained)"""
        lines = [("loss", f"{self.base.loss:.3f}", f"{self.adapter.loss:.3f}")]
        if self.base.perplexity is not None and self.adapter.perplexity is not None:
            lines.append(("perplexity", f"{self.base.perplexity:,.2f}", f"{self.adapter.perplexity:,.2f}"))
        if self.base.numbers is not None and self.adapter.numbers is not None:
            pairs = zip(self.base.numbers.lines(), self.adapter.numbers.lines(), strict=True)
            lines += [(title, _short(before), _short(after)) for (title, before), (_, after) in pairs]
        several = self.adapter.micro_f1 is not None
        for title, name in (
            (f"choice accuracy ({len(self.choices)} labels)", "choice_accuracy"),
            (f"all of a row's labels right ({len(self.choices)} labels)" if several else "exact match", "exact_match"),
            ("F1 over all rows and labels (micro)", "micro_f1"),
            ("mean F1 of the labels (macro)" if several else "mean F1 of the labels", "macro_f1"),
            ("chosen likelier than rejected", "preferred"),
        ):
            before, after = getattr(self.base, name), getattr(self.adapter, name)
            if before is not None and after is not None:
                lines.append((title, f"{100 * before:.1f} %", f"{100 * after:.1f} %"))
        for name, after in self.adapter.metrics.items():
            title = f"{name} (lower is better)" if name in self.lower_is_better else name
            lines.append((title, _short(self.base.metrics.get(name)), _short(after)))
        if self.adapter.classes is not None and self.adapter.classes.largest is not None:
            share = f"{100 * self.adapter.classes.largest:.1f} %"
            lines.append(("always the largest label", share, share))
        return lines


def _short(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"


def compare(
    model: Any,
    renderer: Renderer,
    examples: Sequence[Example],
    *,
    base: Any | None = None,
    seen: Sequence[Example] = (),
    exact_match: bool = False,
    metrics: Sequence[Metric] = (),
    batch_size: int = 16,
) -> Comparison:
    """Measure ``examples`` without and with the active adapters; or with ``base`` and then with ``model``, where
    the one is trained into the other.

    Choice accuracy is measured where the answers are few, those of the rows ``seen`` in training too; exact match
    when asked for, and never of rows with preferences, whose loss is that of their good answers.
    """
    choices = [] if renderer.problem == "regression" else list(renderer.classes) or choices_of(seen, examples)
    judged = any(example.is_judged for example in examples)
    has_texts = not (renderer.classes or judged) and _have_answers(examples)
    exact = exact_match and has_texts
    with as_it_was(model, base) as untrained:
        before = measure(untrained, renderer, examples, choices, exact, batch_size, metrics)
    after = measure(model, renderer, examples, choices, exact, batch_size, metrics)
    trained = "adapter" if base is None else "trained model"
    note = not_followed(model, SamplingOptions()) if exact else ""
    if has_texts and not choices and not exact and not metrics:
        note = _NO_MATCH
    if judged and exact_match:
        note = _JUDGED
    lower = [metric.name for metric in metrics if not metric.higher_is_better]
    return Comparison(len(examples), choices, before, after, trained=trained, lower_is_better=lower, note=note)


def measure(
    model: Any, renderer: Renderer, examples: Sequence[Example], choices: list[str], exact: bool, batch_size: int,
    metrics: Sequence[Metric] = (),
) -> Scores:  # fmt: skip
    """The scores of the model as it is."""
    model.eval()
    scores = _scores(model, renderer, examples, choices, exact, batch_size)
    return replace(scores, metrics=measured_answers(metrics, model, renderer, examples, batch_size))


def _scores(
    model: Any, renderer: Renderer, examples: Sequence[Example], choices: list[str], exact: bool, batch_size: int
) -> Scores:
    rows, _ = renderer.all(good_ones(examples))
    refuse_unknown_tokens_in(model, rows)
    loss = Loss(model, known_pad(model, renderer), rows[0], kind=renderer.kind)
    if renderer.problem == "regression":
        right, given = [*map(number_of, examples)], numbers_said(model, renderer, examples, batch_size)
        return Scores(loss.mean(rows, batch_size), None, numbers=NumberScores.of(right, given))
    if renderer.problem == "multi-label":
        wanted = [*map(labels_in, examples)]
        said = labels_said(model, renderer, examples, batch_size)
        of_labels = Classes.of_several(wanted, said, renderer.classes)
        exact_share = sum({*one} == {*other} for one, other in zip(wanted, said, strict=True)) / len(wanted)
        return Scores(
            loss.mean(rows, batch_size), None, exact_match=exact_share, classes=of_labels,
            macro_f1=of_labels.macro_f1, micro_f1=of_labels.micro_f1,
        )  # fmt: skip
    chosen = likeliest(model, renderer, examples, choices, batch_size) if choices else None
    matched = exact_matches(model, renderer, examples, batch_size) if exact else None
    classes = None
    if chosen is not None:
        labels = [choice.strip() for choice in choices]
        classes = Classes.of([class_of(example) for example in examples], [c.strip() for c in chosen], labels)
    return Scores(
        mean := loss.mean(rows, batch_size),
        math.exp(min(mean, 700)),
        None if chosen is None else accuracy(chosen, examples),
        None if matched is None else sum(matched) / len(matched),
        classes,
        None if classes is None else classes.macro_f1,
        preferred(model, loss, renderer, examples, batch_size) if examples[0].rejected is not None else None,
    )


@torch.no_grad()
def preferred(model: Any, loss: Loss, renderer: Renderer, examples: Sequence[Example], batch_size: int) -> float:
    """The share of pairs whose chosen answer ``model`` finds likelier than the rejected one, by the sum over its
    tokens; half for a tie."""
    pairs, _ = to_pairs(renderer, examples)
    refuse_unknown_tokens_in(model, pairs)
    signs = []
    for part in by_length(pairs, batch_size):
        both = [side for pair in part if isinstance(pair, Pair) for side in (pair.first, pair.second)]
        chosen, rejected = loss.log_probabilities(both).view(-1, 2).unbind(1)
        signs.append((chosen - rejected).sign().cpu())
    return float((torch.cat(signs) / 2 + 0.5).mean())


def _have_answers(examples: Sequence[Example]) -> bool:
    return all(example.messages or example.prompt is not None for example in examples)
