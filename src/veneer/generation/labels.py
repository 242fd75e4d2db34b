"""How likely a model finds each of a few labels after a prompt: a pass over the prompt, and over the labels after it.

What all prompts begin with, an instruction or a system message, is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from veneer.data.formats import Example
from veneer.data.known_tokens import known_pad, refuse_unknown_tokens
from veneer.data.labels import IGNORE, Renderer, Tokens
from veneer.data.questions import with_answer
from veneer.frozen.text_part import text_config_of
from veneer.generation.batched import has_steps
from veneer.generation.decoder import ROTATIONS_BY_LENGTH
from veneer.generation.sampling import refuse_no_numbers
from veneer.kernels.operations.cross_entropy import cross_entropy
from veneer.training.batches import Batch, by_length, collate

_WORTH_SHARING = 4  # tokens
_FORMED = (
    2**25
)  # logits that a pass forms, except for a single row that needs more: 128 MB in fp32, and their logarithms
_KEPT = 2**28  # bytes of keys and values that are repeated for labels, except for a single label: 256 MB


class Asked(NamedTuple):
    """A prompt's tokens, and those of each label after it that are scored."""

    prompt: list[int]
    answers: list[list[int]]


def asked_of(renderer: Renderer, examples: Sequence[Example], labels: list[str]) -> list[Asked]:
    """Each label has the tokens that it is trained on. Its end token counts only where one label's tokens begin
    another's ("no", "no way"), of which the longer one could never be the likelier. The end of a long prompt is kept.
    """
    answers = replace(renderer, learn="answer")
    ends = set(renderer.ends())
    rows = [answers.one(with_answer(example, label)) for example in examples for label in labels]
    whole = [[token for token in row.labels if token != IGNORE] for row in rows]
    bare = [answer[:-1] if len(answer) > 1 and answer[-1] in ends else answer for answer in whole]
    count = len(labels)
    parts = range(0, len(rows), count)
    scored = whole if any(_one_begins_another(bare[i : i + count]) for i in parts) else bare
    return [shortened(_asked(renderer, rows[i], scored[i : i + count]), renderer) for i in parts]


def shortened(asked: Asked, renderer: Renderer) -> Asked:
    """The end of the prompt that, with any of the labels after it, has ``renderer.max_length`` tokens."""
    after = 0 if renderer.seq2seq else max(map(len, asked.answers))
    return asked._replace(prompt=asked.prompt[-max(1, renderer.max_length - after) :])


def _asked(renderer: Renderer, row: Tokens, answers: list[list[int]]) -> Asked:
    if renderer.seq2seq:
        return Asked(row.ids, answers)
    return Asked(row.ids[: next(i for i, label in enumerate(row.labels) if label != IGNORE)], answers)


def _one_begins_another(answers: list[list[int]]) -> bool:
    ordered = sorted(answers)
    return any(longer[: len(shorter)] == shorter for shorter, longer in pairwise(ordered))


class LabelScores:
    """Scores of labels after prompts, of which ``asked`` are all that it will be given: their common beginning is
    computed once. The model and its adapters stay as they are meanwhile."""

    def __init__(self, model: Any, renderer: Renderer, asked: list[Asked]) -> None:
        self._model, self._renderer, self._pad = model, renderer, known_pad(model, renderer)
        tokens = (token for row in asked for part in (row.prompt, *row.answers) for token in part)
        refuse_unknown_tokens(model, "A prompt or a label", [max(tokens)])
        self._longest = max(len(answer) for row in asked for answer in row.answers)
        takes = signature(model.forward).parameters
        self._continues = not renderer.seq2seq and has_steps(model) and "logits_to_keep" in takes and _is_plain(model)
        self._has_positions = "position_ids" in takes
        self._vocabulary = int(getattr(text_config_of(model.config), "vocab_size", None) or 0)
        self.shared = self._common(asked)
        self._prefix = self._read_shared(asked[0].prompt[: self.shared])

    @torch.no_grad()
    def __call__(self, part: list[Asked]) -> Tensor:
        """(rows, labels), fp32: log-likelihoods of the labels, up to a number that is the same for all of a row.
        Raises ModelError where they are no numbers."""
        scores = torch.empty(len(part), len(part[0].answers))
        for rows in self._passes(part):
            scores[rows] = self._scores([part[row] for row in rows])
        refuse_no_numbers(~scores.isnan())
        return scores

    def _passes(self, part: list[Asked]) -> list[list[int]]:
        """The rows that go through the model together: logits are formed for each at the last places of all."""
        passes: list[list[int]] = []
        places: set[int] = set()
        for row in sorted(range(len(part)), key=lambda row: len(part[row].prompt)):
            place = len(part[row].prompt)
            if passes and (len(passes[-1]) + 1) * len(places | {place}) * self._vocabulary <= _FORMED:
                passes[-1].append(row)
                places.add(place)
            else:
                passes.append([row])
                places = {place}
        return passes

    def _scores(self, part: list[Asked]) -> Tensor:
        if self._continues:
            return self._by_continuing(part)
        if not self._renderer.seq2seq and self._longest == 1:
            return self._by_first_token(part)
        return self._by_whole_rows(part)

    def width(self, row: Asked) -> int:
        """Tokens that a pass computes for a row."""
        if self._continues:
            return len(row.prompt) - self.shared + len(_stems(row)) * (self._longest - 1)
        if not self._renderer.seq2seq and self._longest == 1:
            return len(row.prompt)
        return len(row.answers) * (len(row.prompt) + self._longest)

    def _common(self, asked: list[Asked]) -> int:
        """Tokens that all prompts begin with, each having one more; 0 where sharing them is not worth it."""
        if not self._continues or len(asked) < 2 or _rotates_by_length(self._model):
            return 0
        first, last = min(row.prompt for row in asked), max(row.prompt for row in asked)
        common = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
        common = min(common, min(len(row.prompt) for row in asked) - 1)
        return common if common >= _WORTH_SHARING else 0

    @torch.no_grad()
    def _read_shared(self, prefix: list[int]) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        if prefix:
            ids = torch.tensor([prefix], device=self._model.device)
            self._pass(ids, torch.ones_like(ids), cache, torch.tensor([0]))
        return cache

    def _pass(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None, places: Tensor) -> Tensor:
        """Logits (rows, places, vocabulary) at ``places`` of each row of ``ids``; ``mask`` is of all tokens so far."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        logits: Tensor = self._model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None,
            logits_to_keep=places.to(ids.device), **({"position_ids": positions} if self._has_positions else {}),
        ).logits  # fmt: skip
        return logits

    def _by_continuing(self, part: list[Asked]) -> Tensor:
        """The prompts in one pass; then, where labels have several tokens, these tokens after them in another one."""
        rows, several = len(part), self._longest > 1
        ids, mask = self._padded([row.prompt[self.shared :] for row in part])
        mask = torch.cat([mask.new_ones(rows, self.shared), mask], dim=1)
        cache = None
        if self.shared or several:
            cache = deepcopy(self._prefix)
            cache.batch_repeat_interleave(rows)
        places, which = torch.unique(mask.sum(1).cpu() - 1 - self.shared, return_inverse=True)
        logits = self._pass(ids, mask, cache, places)
        logits = logits[torch.arange(rows, device=logits.device), which.to(logits.device)]
        logs = logits.float().log_softmax(-1).cpu()
        scores = logs.gather(1, torch.tensor([[answer[0] for answer in row.answers] for row in part]))
        return scores + self._rest(part, mask, cache) if cache is not None and several else scores

    def _rest(self, part: list[Asked], mask: Tensor, cache: DynamicCache) -> Tensor:
        """(rows, labels): the log-likelihoods of the labels' tokens from the second on. What several labels of a row
        have in common up to their last token is one sequence, and a pass takes as many sequences as the memory of
        their keys and values, and of their logits, allows."""
        scores = torch.zeros(len(part), len(part[0].answers))
        stems = [(number, stem) for number, row in enumerate(part) for stem in _stems(row)]
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // len(part)
        most = max(1, min(_KEPT // max(1, kept), _FORMED // max(1, self._vocabulary * (self._longest - 1))))
        for start in range(0, len(stems), most):
            some = stems[start : start + most]
            rows = torch.tensor([number for number, _ in some])
            ids, more = self._padded([list(stem) for _, stem in some])
            after = torch.cat([mask[rows.to(mask.device)], more], dim=1)
            logs = self._pass(ids, after, _of_rows(cache, rows, self._model.config), torch.arange(ids.shape[1]))
            logs = logs.float().log_softmax(-1).cpu()
            for (number, stem), at in zip(some, logs, strict=True):
                for label, answer in enumerate(part[number].answers):
                    if len(answer) > 1 and tuple(answer[:-1]) == stem:
                        scores[number, label] = at[range(len(stem)), answer[1:]].sum()
        return scores

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Tokens and mask (rows, width), padded at the right."""
        batch = collate([Tokens(ids, [], "") for ids in rows], self._pad)
        return batch.ids.to(self._model.device), batch.mask.to(self._model.device)

    def _by_first_token(self, part: list[Asked]) -> Tensor:
        """By a pass of any model, which keeps nothing."""
        batch = _on(self._model, collate([Tokens(row.prompt, [], "") for row in part], self._pad))
        logits = _logits(self._model, batch, batch.mask.sum(dim=1) - 1).float().log_softmax(-1).cpu()
        return logits.gather(1, torch.tensor([[answer[0] for answer in row.answers] for row in part]))

    def _by_whole_rows(self, part: list[Asked]) -> Tensor:
        """Each label after its prompt, from the start: encoder-decoders, and models that keep no keys and values."""
        rows = [_whole(self._renderer, row.prompt, answer) for row in part for answer in row.answers]
        return _log_likelihoods(self._model, self._renderer, rows, len(part)).view(len(part), -1)


def _whole(renderer: Renderer, prompt: list[int], answer: list[int]) -> Tokens:
    if renderer.seq2seq:
        return Tokens(prompt, answer, "")
    return Tokens([*prompt, *answer], [IGNORE] * len(prompt) + answer, "")


def _stems(row: Asked) -> list[tuple[int, ...]]:
    """The labels of several tokens without their last one, each once."""
    return list(dict.fromkeys(tuple(answer[:-1]) for answer in row.answers if len(answer) > 1))


def _of_rows(cache: DynamicCache, rows: Tensor, config: Any) -> DynamicCache:
    """The keys and values of these rows, which may be several times the same, for sequences that go on from them."""
    chosen = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        where = rows.to(layer.keys.device)
        chosen.update(layer.keys[where], layer.values[where], number)
    return chosen


def _is_plain(model: Any) -> bool:
    """Whether each layer keeps the keys and values of all tokens and nothing else."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _rotates_by_length(model: Any) -> bool:
    how = getattr(text_config_of(model.config), "rope_parameters", None) or {}
    return how.get("rope_type") in ROTATIONS_BY_LENGTH


def _logits(model: Any, batch: Batch, places: Tensor) -> Tensor:
    """(rows, vocabulary) at a place of each row; where the model can, formed at these places of the batch alone."""
    some: dict[str, Tensor] = {}
    if "logits_to_keep" in signature(model.forward).parameters:
        some["logits_to_keep"], places = torch.unique(places, return_inverse=True)
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **some).logits
    return logits[torch.arange(len(logits), device=logits.device), places]


def _log_likelihoods(model: Any, renderer: Renderer, rows: list[Tokens], size: int) -> Tensor:
    """(rows,) sums of the log-likelihoods of the learned tokens."""
    numbers = {id(row): i for i, row in enumerate(rows)}
    scores = torch.empty(len(rows))
    for part in by_length(rows, size):
        for some in within_logits(part, model):
            batch = _on(model, collate(some, known_pad(model, renderer)))
            logits, labels = learned_logits(model, batch, renderer.kind)
            losses = torch.split(cross_entropy(logits, labels, 0.0).cpu(), [row.learned for row in some])
            scores[[numbers[id(row)] for row in some]] = torch.stack([-own.sum() for own in losses]).float()
    return scores


def within_logits(rows: list[Tokens], model: Any) -> list[list[Tokens]]:
    """The rows in parts whose logits `learned_logits` forms in bounded memory, a row at the least."""
    vocabulary = int(getattr(text_config_of(model.config), "vocab_size", None) or 0)
    keeps = "logits_to_keep" in signature(model.forward).parameters
    parts: list[list[Tokens]] = []
    places: set[int] = set()
    for row in rows:
        own = {i for i, label in enumerate(row.labels) if label != IGNORE} if keeps else set(range(len(row.labels)))
        if parts and (len(parts[-1]) + 1) * len(places | own) * vocabulary <= _FORMED:
            parts[-1].append(row)
            places |= own
        else:
            parts.append([row])
            places = own
    return parts


def learned_logits(model: Any, batch: Batch, kind: str) -> tuple[Tensor, Tensor]:
    """Logits (learned, vocabulary) at which the learned tokens are predicted, row by row, and these tokens (learned,).

    A model that takes ``logits_to_keep`` forms them at no other places than where a row of the batch learns.
    """
    if kind == "seq2seq":
        shifted = model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
        logits = model(
            input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=shifted, use_cache=False
        ).logits  # fmt: skip
        learned = batch.labels != IGNORE
        return logits[learned], batch.labels[learned]
    labels, some = batch.labels[:, 1:], dict[str, Tensor]()
    if "logits_to_keep" in signature(model.forward).parameters:
        places = (labels != IGNORE).any(0).nonzero()[:, 0]
        some["logits_to_keep"], labels = places, labels[:, places]
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **some).logits
    learned = labels != IGNORE
    return logits[:, : labels.shape[1]][learned], labels[learned]


def _on(model: Any, batch: Batch) -> Batch:
    return Batch(*(tensor.to(model.device) for tensor in batch))
