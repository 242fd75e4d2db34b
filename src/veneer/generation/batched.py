"""Generation by a transformers model's own forward pass, or where a session of it cannot be, by its generate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from veneer.data.known_tokens import known_pad
from veneer.data.labels import Renderer
from veneer.generation.lane import Continuation
from veneer.generation.own_settings import OwnSettings
from veneer.generation.sampling import Sampler, draw
from veneer.updates.record import adapters_of, row_adapters


def has_steps(model: Any) -> bool:
    """Whether a pass takes the keys and values of the tokens before, so that sequences can go on one by one."""
    kept = "past_key_values" in signature(model.forward).parameters and model._supports_default_dynamic_cache()
    return bool(kept and not model._is_stateful and not model.config.is_encoder_decoder)


class BatchedLane:
    """Sequences in batches, each a pass a step. Those that are added together are read together, and join a batch
    that goes on where all its layers keep plain keys and values; layers with a window or a state keep batches apart."""

    def __init__(self, model: Any, pad: int) -> None:
        self._model, self._pad = model, pad
        self._pending: list[Continuation] = []
        self._batches: list[_Batch] = []

    def add(self, continuation: Continuation) -> None:
        self._pending.append(continuation)

    def step(self) -> list[tuple[Continuation, int]]:
        added = [pair for batch in self._batches for pair in batch.step()]
        if self._pending:
            new = _Batch(self._model, self._pending, self._pad)
            self._pending = []
            added += new.read()
            other = next((batch for batch in self._batches if batch.is_plain() and new.is_plain()), None)
            if other is None:
                self._batches.append(new)
            else:
                other.join(new)
        return added

    def drop(self, continuations: list[Continuation]) -> None:
        gone = {id(continuation) for continuation in continuations}
        self._pending = [one for one in self._pending if id(one) not in gone]
        for batch in self._batches:
            batch.keep([row for row, member in enumerate(batch.members) if id(member) not in gone])
        self._batches = [batch for batch in self._batches if batch.members]


class _Batch:
    """Sequences that a model goes on with in one pass; ``mask`` (rows, width) is 0 in a row's padding, at its left."""

    def __init__(self, model: Any, members: list[Continuation], pad: int) -> None:
        self.members = members
        self._model = model
        self.ids, self.mask = padded(model, members, pad)
        self.cache = DynamicCache(config=model.config)
        takes = signature(model.forward).parameters
        self._has_positions = "position_ids" in takes
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def read(self) -> list[tuple[Continuation, int]]:
        return self._pass(self.ids)

    def step(self) -> list[tuple[Continuation, int]]:
        ids = torch.tensor([[member.tokens[-1]] for member in self.members], device=self.mask.device)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._pass(ids)

    def _pass(self, ids: Tensor) -> list[tuple[Continuation, int]]:
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with each_its_own(self._model, self.members, ids.shape[1]):
            logits: Tensor = self._model(
                input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **self._last,
                **({"position_ids": positions} if self._has_positions else {}),
            ).logits[:, -1]  # fmt: skip
        tokens = draw(logits, [member.sampler for member in self.members])
        return list(zip(self.members, tokens, strict=True))

    def is_plain(self) -> bool:
        """Whether each layer keeps the keys and values of all tokens and nothing else."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def join(self, other: _Batch) -> None:
        """Take over the rows of another batch; the shorter of the two is padded."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for layer, more in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys = torch.cat([_widened(layer.keys, width), _widened(more.keys, width)])
            layer.values = torch.cat([_widened(layer.values, width), _widened(more.values, width)])
        masks = [F.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        self.mask, self.members = torch.cat(masks), [*self.members, *other.members]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone, and without the padding that they all have."""
        if len(rows) == len(self.members):
            return
        self.members = [self.members[row] for row in rows]
        if not rows:
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)
        spare = int(self.mask.argmax(1).min())
        if spare and self.is_plain():
            self.mask = self.mask[:, spare:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, spare:].clone(), layer.values[:, :, spare:].clone()


def _widened(kept: Any, width: int) -> Tensor:
    """Keys or values (rows, heads, tokens, dim) with zeros before them, up to ``width`` tokens."""
    return F.pad(kept, (0, 0, width - kept.shape[2], 0))


class WholeLane:
    """Encoder-decoders, and models whose state is not keys and values: transformers generates whole answers in the step
    after they were added, and each step hands out one token of them. What they cost is paid in that first step, also by
    an answer that is dropped later."""

    def __init__(self, model: Any, renderer: Renderer, own: OwnSettings) -> None:
        self._model, self._renderer, self._own = model, renderer, own
        self._pending: list[Continuation] = []
        self._answers: dict[int, tuple[Continuation, Iterator[int]]] = {}

    def add(self, continuation: Continuation) -> None:
        self._pending.append(continuation)

    def step(self) -> list[tuple[Continuation, int]]:
        if self._pending:
            for member, answer in zip(self._pending, self._generate(self._pending), strict=True):
                self._answers[member.key] = member, iter(answer)
            self._pending = []
        return [(member, next(answer)) for member, answer in self._answers.values()]

    def drop(self, continuations: list[Continuation]) -> None:
        gone = {continuation.key for continuation in continuations}
        self._pending = [one for one in self._pending if one.key not in gone]
        self._answers = {key: answer for key, answer in self._answers.items() if key not in gone}

    def _generate(self, members: list[Continuation]) -> list[list[int]]:
        """The tokens after each prompt, padded after an end token up to the longest limit."""
        pad = known_pad(self._model, self._renderer)
        ids, mask = padded(self._model, members, pad)
        how = GenerationConfig(
            max_new_tokens=max(member.limit for member in members), do_sample=False,
            eos_token_id=sorted(self._own.ends) or None, pad_token_id=pad,
            bos_token_id=self._renderer.tokenizer.bos_token_id, decoder_start_token_id=self._own.start,
        )  # fmt: skip
        drawn = LogitsProcessorList([_Drawn([member.sampler for member in members])])
        with each_its_own(self._model, members, ids.shape[1]), _without_settings(self._model):
            out = self._model.generate(
                input_ids=ids, attention_mask=mask, generation_config=how, logits_processor=drawn
            )  # fmt: skip
        # A decoder's answer begins with its start token, which no one generated.
        tokens: list[list[int]] = out[:, 1 if self._renderer.seq2seq else ids.shape[1] :].tolist()
        return tokens


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """transformers' generate fills in what it is not given from the model's settings; here samplers decide alone."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Makes the token that each row's sampler draws the likeliest, for a search that takes the likeliest."""

    def __init__(self, samplers: list[Sampler]) -> None:
        self._samplers = samplers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = torch.tensor(draw(scores, self._samplers), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def padded(model: Any, members: list[Continuation], pad: int) -> tuple[Tensor, Tensor]:
    """The prompts' tokens and their mask, int64 (rows, width) both, padded at the left: every row goes on from its own
    last token."""
    width = max(len(member.prompt) for member in members)
    ids = [[pad] * (width - len(member.prompt)) + member.prompt for member in members]
    mask = [[0] * (width - len(member.prompt)) + [1] * len(member.prompt) for member in members]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def each_its_own(model: Any, members: list[Continuation], width: int) -> AbstractContextManager[None]:
    """A pass in which each row has its continuation's adapters; where these are the active ones, the model as it is."""
    names = [member.adapters for member in members]
    if all(each == adapters_of(model).active for each in names):
        return nullcontext()
    return row_adapters(model, names, width)
