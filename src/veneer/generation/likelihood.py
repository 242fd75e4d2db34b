"""How likely a model finds answers: the choice among a few labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.data.formats import Example, class_of, named_labels
from veneer.data.known_tokens import known_pad, refuse_unknown_tokens_in
from veneer.data.labels import Renderer
from veneer.data.token_rows import TokenRows, Tokens
from veneer.generation.labels import LabelScores, asked_of
from veneer.generation.sampling import refuse_no_numbers
from veneer.training.batches import collate

MOST_CHOICES = 20
DIGITS = 6  # of a number or probability that is written; fp32 has seven
_HALF = 0.5  # the probability above which a text has a label


def choices_of(*sides: Sequence[Example]) -> list[str]:
    """The distinct answers of all rows, when they are few enough to choose among (each given several times); else none.

    Twenty at most, five rows for each on average. Answers that differ in space around them are one. Rows with
    preferences are no rows of labels.
    """
    most = min(MOST_CHOICES, sum(map(len, sides)) // 5)
    answers: dict[str, str] = {}
    for example in chain.from_iterable(sides):
        name = class_of(example)
        answers[name] = min(answers.get(name, example.answer), example.answer)
        if example.prompt is None or example.is_judged or len(answers) > most:
            return []
    return sorted(answers.values()) if len(answers) > 1 else []


@torch.no_grad()
def likeliest(
    model: Any, renderer: Renderer, examples: Sequence[Example], choices: list[str], batch_size: int
) -> list[str]:
    """The most likely of ``choices`` after each example's prompt, by the sum of its tokens' log-likelihoods.

    Each choice has the tokens that it is trained on. Its end token counts only where one choice's tokens begin
    another's ("no", "no way"), of which the longer one could never be the likelier.
    """
    if renderer.classes:  # of several labels all that it has, as one text; of a number the number
        return _classify(model, renderer, examples, batch_size)
    asked = asked_of(renderer, examples, choices)
    scores_of = LabelScores(model, renderer, asked)
    scores = torch.empty(len(asked), len(choices))
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        scores[part] = scores_of([asked[i] for i in part])
    return [choices[i] for i in scores.argmax(dim=1).tolist()]


def accuracy(chosen: list[str], examples: Sequence[Example]) -> float:
    """Share of the examples whose answer was chosen."""
    right = sum(answer.strip() == class_of(example) for answer, example in zip(chosen, examples, strict=True))
    return right / len(examples)


def _classify(model: Any, renderer: Renderer, examples: Sequence[Example], size: int) -> list[str]:
    chosen = []
    for start in range(0, len(examples), size):
        scores = class_scores(model, renderer, classified(renderer, examples[start : start + size]))
        chosen += [said.text for said in said_by(scores, renderer)]
    return chosen


class Said(NamedTuple):
    """What a classifier says of a text: the likeliest class, or all labels that are likelier than not, and each one's
    probability; or a number, and none."""

    text: str
    probabilities: dict[str, float]
    labels: tuple[str, ...] | None = None  # of a text that may have several
    number: float | None = None

    def __str__(self) -> str:
        """As a person reads it: yes (93.1 %)."""
        if self.number is not None:
            return self.text
        shown = [name for name in self.probabilities if self.labels is None or name in self.labels]
        if not shown:
            return f"none of the {len(self.probabilities)} labels"
        return ", ".join(f"{name} ({100 * self.probabilities[name]:.1f} %)" for name in shown[: self._shown])

    @property
    def _shown(self) -> int | None:
        return 1 if self.labels is None else None


def said_by(scores: Tensor, renderer: Renderer) -> list[Said]:
    """A classifier's scores (rows, classes) → what it says of each row: of one class of several softmax(scores), of
    each label by itself sigmoid(scores), of which those above one half are the text's, and of a number the score."""
    if renderer.problem == "regression":
        return [Said(f"{number:.{DIGITS}g}", {}, number=number) for number in scores[:, 0].tolist()]
    if renderer.problem == "multi-label":
        found = []
        for shares in scores.cpu().double().sigmoid().tolist():
            by_name = dict(zip(renderer.classes, shares, strict=True))
            labels = tuple(name for name, share in by_name.items() if share > _HALF)
            found.append(Said(named_labels(labels), by_name, labels))
        return found
    best, shares = scores.argmax(dim=1).tolist(), scores.cpu().double().softmax(dim=1).tolist()
    return [
        Said(renderer.classes[choice], dict(zip(renderer.classes, each, strict=True)))
        for choice, each in zip(best, shares, strict=True)
    ]


def class_answer(model: Any, renderer: Renderer, example: Example) -> Said:
    """What a classifier says of the example's prompt, the most likely class or label first."""
    (said,) = said_by(class_scores(model, renderer, classified(renderer, [example])), renderer)
    return said._replace(probabilities=dict(sorted(said.probabilities.items(), key=lambda pair: -pair[1])))


def numbers_said(model: Any, renderer: Renderer, examples: Sequence[Example], size: int) -> list[float]:
    """The number that a model of task regression gives for each example."""
    found: list[float] = []
    for start in range(0, len(examples), size):
        found += class_scores(model, renderer, classified(renderer, examples[start : start + size]))[:, 0].tolist()
    return found


def labels_said(model: Any, renderer: Renderer, examples: Sequence[Example], size: int) -> list[tuple[str, ...]]:
    """The labels that a model of task multi-label gives each example."""
    found: list[tuple[str, ...]] = []
    for start in range(0, len(examples), size):
        scores = class_scores(model, renderer, classified(renderer, examples[start : start + size]))
        found += [said.labels or () for said in said_by(scores, renderer)]
    return found


def classified(renderer: Renderer, examples: Sequence[Example]) -> TokenRows:
    """The tokens that a classifier is given; an example's own label, if it has one, plays no part."""
    if renderer.long_rows == "drop":  # an answer is due to each
        renderer = replace(renderer, long_rows="cut")
    held = "0" if renderer.problem == "regression" else renderer.classes[0]
    rows, _ = renderer.all([replace(example, answer=held, labels=None) for example in examples])
    return rows


@torch.no_grad()
def class_scores(model: Any, renderer: Renderer, rows: Sequence[Tokens]) -> Tensor:
    """(rows, classes): a classifier's logits, fp32. Raises ModelError where they are no numbers."""
    refuse_unknown_tokens_in(model, rows)
    batch = collate(rows, known_pad(model, renderer), problem=renderer.problem)
    logits: Tensor = model(input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device)).logits
    refuse_no_numbers(~logits.isnan())
    return logits.float().cpu()
