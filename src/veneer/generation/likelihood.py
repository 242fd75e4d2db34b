"""How likely a model finds answers: the choice among a few labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from veneer.data.formats import Example, class_of
from veneer.data.known_tokens import known_pad, refuse_unknown_tokens_in
from veneer.data.labels import Renderer
from veneer.data.token_rows import TokenRows, Tokens
from veneer.generation.labels import LabelScores, asked_of
from veneer.generation.sampling import refuse_no_numbers
from veneer.training.batches import collate

MOST_CHOICES = 20


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
    if renderer.classes:
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
        chosen += [renderer.classes[i] for i in scores.argmax(dim=1).tolist()]
    return chosen


def class_probabilities(model: Any, renderer: Renderer, example: Example) -> dict[str, float]:
    """A classifier's class → its probability for the example's prompt, the most likely first."""
    shares = class_scores(model, renderer, classified(renderer, [example]))[0].double().softmax(0).tolist()
    return dict(sorted(zip(renderer.classes, shares, strict=True), key=lambda pair: -pair[1]))


def classified(renderer: Renderer, examples: Sequence[Example]) -> TokenRows:
    """The tokens that a classifier is given; an example's own label, if it has one, plays no part."""
    if renderer.long_rows == "drop":  # an answer is due to each
        renderer = replace(renderer, long_rows="cut")
    rows, _ = renderer.all([replace(example, answer=renderer.classes[0]) for example in examples])
    return rows


@torch.no_grad()
def class_scores(model: Any, renderer: Renderer, rows: Sequence[Tokens]) -> Tensor:
    """(rows, classes): a classifier's logits, fp32. Raises ModelError where they are no numbers."""
    refuse_unknown_tokens_in(model, rows)
    batch = collate(rows, known_pad(model, renderer), classes=True)
    logits: Tensor = model(input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device)).logits
    refuse_no_numbers(~logits.isnan())
    return logits.float().cpu()
