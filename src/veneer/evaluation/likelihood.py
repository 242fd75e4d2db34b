"""How likely a model finds answers: the choice among a few labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from veneer.data.formats import Example, class_of
from veneer.data.labels import IGNORE, Tokeniser, Tokens
from veneer.training.batches import Batch, by_length, collate

MOST_CHOICES = 20


def choices_of(examples: list[Example]) -> list[str]:
    """The distinct answers, when they are few enough to choose among (each given several times); else none.

    Twenty at most, five rows for each on average.
    """
    if any(example.prompt is None for example in examples):
        return []
    answers = sorted({example.answer for example in examples})
    return answers if 1 < len(answers) <= min(MOST_CHOICES, len(examples) // 5) else []


@torch.no_grad()
def choose(model: Any, tokeniser: Tokeniser, examples: list[Example], choices: list[str], batch_size: int) -> list[str]:
    """The most likely of ``choices`` after each example's prompt, by the sum of its tokens' log-likelihoods."""
    if tokeniser.classes:
        return _classify(model, tokeniser, examples, batch_size)
    answers = [tokeniser.encode(choice.strip() if tokeniser.seq2seq else choice) for choice in choices]
    prompts = [tokeniser.prompt(example)[-tokeniser.max_length :] for example in examples]
    if not tokeniser.seq2seq and all(len(answer) == 1 for answer in answers):
        scores = _first_token(model, tokeniser, prompts, [answer[0] for answer in answers], batch_size)
    else:
        rows = [_row(prompt, answer, tokeniser.seq2seq) for prompt in prompts for answer in answers]
        scores = _log_likelihoods(model, tokeniser, rows, batch_size).view(len(prompts), len(answers))
    return [choices[i] for i in scores.argmax(dim=1).tolist()]


def accuracy(chosen: list[str], examples: list[Example]) -> float:
    """Share of the examples whose answer was chosen."""
    right = sum(answer.strip() == class_of(example) for answer, example in zip(chosen, examples, strict=True))
    return right / len(examples)


def _row(prompt: list[int], answer: list[int], seq2seq: bool) -> Tokens:
    if seq2seq:
        return Tokens(prompt, answer, "")
    return Tokens(prompt + answer, [IGNORE] * len(prompt) + answer, "")


def _first_token(model: Any, tokeniser: Tokeniser, prompts: list[list[int]], tokens: list[int], size: int) -> Tensor:
    """(prompts, tokens) logits after each prompt: one pass tells all choices of one token."""
    scores = torch.empty(len(prompts), len(tokens))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = _on(model, collate([Tokens(prompts[i], [IGNORE] * len(prompts[i]), "") for i in part], tokeniser.pad))
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        last = logits[torch.arange(len(part)), batch.mask.sum(dim=1) - 1]
        scores[part] = last[:, tokens].float().cpu()
    return scores


def _log_likelihoods(model: Any, tokeniser: Tokeniser, rows: list[Tokens], size: int) -> Tensor:
    """(rows,) sums of the log-likelihoods of the learned tokens."""
    places = {id(row): i for i, row in enumerate(rows)}
    scores = torch.empty(len(rows))
    for part in by_length(rows, size):
        batch = _on(model, collate(part, tokeniser.pad))
        if tokeniser.seq2seq:
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


def _classify(model: Any, tokeniser: Tokeniser, examples: list[Example], size: int) -> list[str]:
    chosen = []
    # What is asked is how a text is classified; its own label, if it has one, plays no part.
    unlabelled = [replace(example, answer=tokeniser.classes[0]) for example in examples]
    for start in range(0, len(examples), size):
        rows, _ = tokeniser.all(unlabelled[start : start + size])
        batch = _on(model, collate(rows, tokeniser.pad, classes=True))
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        chosen += [tokeniser.classes[i] for i in logits.argmax(dim=1).tolist()]
    return chosen


def _on(model: Any, batch: Batch) -> Batch:
    return Batch(*(tensor.to(model.device) for tensor in batch))
