"""How likely a model finds answers: the choice among a few labels."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from veneer.data.formats import Example, class_of
from veneer.data.labels import IGNORE, Renderer, Tokens
from veneer.training.batches import Batch, by_length, collate

MOST_CHOICES = 20


def choices_of(examples: list[Example]) -> list[str]:
    """The distinct answers, when they are few enough to choose among (each given several times); else none.

    Twenty at most, five rows for each on average. Answers that differ in space around them are one.
    """
    if any(example.prompt is None for example in examples):
        return []
    answers = {class_of(example): example.answer for example in sorted(examples, key=lambda e: e.answer, reverse=True)}
    return sorted(answers.values()) if 1 < len(answers) <= min(MOST_CHOICES, len(examples) // 5) else []


@torch.no_grad()
def likeliest(
    model: Any, renderer: Renderer, examples: list[Example], choices: list[str], batch_size: int
) -> list[str]:
    """The most likely of ``choices`` after each example's prompt, by the sum of its tokens' log-likelihoods.

    Each choice has the tokens that it is trained on. Its end token counts only where one choice's tokens begin
    another's ("no", "no way"), of which the longer one could never be the likelier.
    """
    if renderer.classes:
        return _classify(model, renderer, examples, batch_size)
    rows = _rows(renderer, examples, choices)
    if not renderer.seq2seq and all(row.learned == 1 for row in rows):
        scores = _first_token(model, renderer, rows[:: len(choices)], rows, batch_size)
    else:
        scores = _log_likelihoods(model, renderer, rows, batch_size)
    return [choices[i] for i in scores.view(len(examples), len(choices)).argmax(dim=1).tolist()]


def _rows(renderer: Renderer, examples: list[Example], choices: list[str]) -> list[Tokens]:
    """(examples · choices) rows, of which the choice is learned."""
    answers = replace(renderer, learn="answer")
    ends, limit = set(renderer.ends()), renderer.max_length
    rows = [answers.one(replace(example, answer=choice)) for example in examples for choice in choices]
    whole = [[label for label in row.labels if label != IGNORE] for row in rows]
    bare = [answer[:-1] if len(answer) > 1 and answer[-1] in ends else answer for answer in whole]
    ambiguous = any(_one_begins_another(bare[i : i + len(choices)]) for i in range(0, len(bare), len(choices)))
    scored = whole if ambiguous else bare
    if renderer.seq2seq:
        return [Tokens(row.ids[-limit:], answer, "") for row, answer in zip(rows, scored, strict=True)]
    cut = []
    for row, answer in zip(rows, scored, strict=True):
        start = next(i for i, label in enumerate(row.labels) if label != IGNORE)
        ids = [*row.ids[:start], *answer][-limit:]  # the end of a long prompt is kept
        cut.append(Tokens(ids, [IGNORE] * (len(ids) - len(answer)) + answer, ""))
    return cut


def _one_begins_another(answers: list[list[int]]) -> bool:
    ordered = sorted(answers)
    return any(longer[: len(shorter)] == shorter for shorter, longer in pairwise(ordered))


def accuracy(chosen: list[str], examples: list[Example]) -> float:
    """Share of the examples whose answer was chosen."""
    right = sum(answer.strip() == class_of(example) for answer, example in zip(chosen, examples, strict=True))
    return right / len(examples)


def _first_token(model: Any, renderer: Renderer, asked: list[Tokens], rows: list[Tokens], size: int) -> Tensor:
    """(rows,) logits of the last token of ``rows``: one pass for ``asked``, a row of each prompt, gives all of them."""
    scores = torch.empty(len(asked), len(rows) // len(asked))
    answers = torch.tensor([row.ids[-1] for row in rows]).view(scores.shape)
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = _on(model, collate([asked[i] for i in part], renderer.pad))
        scores[part] = _logits(model, batch, batch.mask.sum(dim=1) - 2).float().cpu().gather(1, answers[part])
    return scores


def _logits(model: Any, batch: Batch, places: Tensor) -> Tensor:
    """(rows, vocabulary) at a place of each row; where the model can, formed at these places of the batch alone."""
    some: dict[str, Tensor] = {}
    if "logits_to_keep" in signature(model.forward).parameters:
        some["logits_to_keep"], places = torch.unique(places, return_inverse=True)
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **some).logits
    return logits[torch.arange(len(logits), device=logits.device), places]


def _log_likelihoods(model: Any, renderer: Renderer, rows: list[Tokens], size: int) -> Tensor:
    """(rows,) sums of the log-likelihoods of the learned tokens."""
    places = {id(row): i for i, row in enumerate(rows)}
    scores = torch.empty(len(rows))
    for part in by_length(rows, size):
        batch = _on(model, collate(part, renderer.pad))
        if renderer.seq2seq:
            shifted = model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
            logits = model(input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=shifted).logits
            labels = batch.labels
        else:
            logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
            labels = batch.labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
        )
        scores[[places[id(row)] for row in part]] = -losses.view(labels.shape).sum(dim=1).cpu()
    return scores


def _classify(model: Any, renderer: Renderer, examples: list[Example], size: int) -> list[str]:
    return [renderer.classes[i] for i in _class_logits(model, renderer, examples, size).argmax(dim=1).tolist()]


@torch.no_grad()
def class_probabilities(model: Any, renderer: Renderer, example: Example) -> dict[str, float]:
    """A classifier's class → its probability for the example's prompt, the most likely first."""
    shares = _class_logits(model, renderer, [example], 1)[0].double().softmax(0).tolist()
    return dict(sorted(zip(renderer.classes, shares, strict=True), key=lambda pair: -pair[1]))


def _class_logits(model: Any, renderer: Renderer, examples: list[Example], size: int) -> Tensor:
    """(examples, classes)"""
    logits = []
    # What is asked is how a text is classified; its own label, if it has one, plays no part.
    unlabelled = [replace(example, answer=renderer.classes[0]) for example in examples]
    for start in range(0, len(examples), size):
        rows, _ = renderer.all(unlabelled[start : start + size])
        batch = _on(model, collate(rows, renderer.pad, classes=True))
        logits.append(model(input_ids=batch.ids, attention_mask=batch.mask).logits.float().cpu())
    return torch.cat(logits)


def _on(model: Any, batch: Batch) -> Batch:
    return Batch(*(tensor.to(model.device) for tensor in batch))
