"""Generation as a session: sequences join and leave while others go on, each with an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from veneer.arguments import refuse_no_model
from veneer.data.known_tokens import known_pad, refuse_unknown_tokens
from veneer.data.labels import Renderer
from veneer.errors import DataError, ModelError
from veneer.frozen.text_part import text_config_of
from veneer.generation.batched import BatchedLane, WholeLane, has_steps
from veneer.generation.config import SamplingOptions
from veneer.generation.decoder import DecoderLane, Unsupported
from veneer.generation.lane import Continuation, Lane
from veneer.generation.own_settings import own_settings
from veneer.generation.sampling import Sampler
from veneer.generation.text import Text
from veneer.updates.record import adapters_of, refuse_merged, refuse_unknown
from veneer.updates.rows import Names

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from veneer.generation.arguments import SamplingArguments


class Adapter(Enum):
    """Which adapters a sequence is generated with, where it names none."""

    ACTIVE = "active"


class Added(NamedTuple):
    """What a step added to a sequence."""

    key: int
    token: int
    ended: bool  # by this token, an end token or the last of its limit


class Session:
    """Text of ``model`` after any number of prompts, a token a step.

    Models of Llama's kind go on by the C++ kernels, one call a step for all sequences that have the same adapters; any
    other model by its own forward pass over all of them, whatever their adapters, and encoder-decoders by transformers'
    generate, whole answers at once. The model and its adapters are not changed as long as there are sequences; but
    others of its adapters may be activated.

    Example:
        >>> session = Session(model, renderer)
        >>> key = session.add(renderer.encode("The capital of France is"), max_new_tokens=8)
        >>> tokens = []
        >>> while session.keys():
        ...     tokens += [added.token for added in session.step() if added.key == key]
    """

    def __init__(self, model: Any, renderer: Renderer) -> None:
        self._own = own_settings(model, renderer)
        self._model, self._renderer = model, renderer
        self._live: dict[int, tuple[Continuation, Lane]] = {}
        self._next = 0
        self._decoder = DecoderLane(model)
        self._other: Lane = (
            BatchedLane(model, known_pad(model, renderer))
            if has_steps(model)
            else WholeLane(model, renderer, self._own)
        )

    def add(
        self, prompt: list[int], *, adapter: str | Literal[Adapter.ACTIVE] | None = Adapter.ACTIVE,
        max_new_tokens: int = 64, **how: Unpack[SamplingArguments],
    ) -> int:  # fmt: skip
        """Begin a sequence after ``prompt`` (token ids) and return its key; it gets its first token in the next step.

        ``adapter``: the name of one, None for the base, by default those that are active now. ``how``: the others of
        `SamplingOptions`; tokens are drawn from a generator of this sequence alone. Raises DataError for a prompt that
        is empty or fills the model's positions, ModelError for one with a token that the model does not have,
        TargetError for an adapter that is not attached, ConfigError for an option that makes no sense.
        """
        asked = SamplingOptions(max_new_tokens=max_new_tokens, **how)
        adapters = self._adapters(adapter)
        limit = min(asked.max_new_tokens, self._positions_after(prompt))
        refuse_unknown_tokens(self._model, "A prompt", prompt)
        new = self._continuation(prompt, adapters, limit, asked)
        lane: Lane = self._decoder
        with _evaluating(self._model):
            try:
                lane.add(new)
            except Unsupported:
                lane = self._other
                lane.add(new)
        self._live[new.key] = new, lane
        self._next += 1
        return new.key

    @torch.no_grad()
    def step(self) -> list[Added]:
        """One token more in each sequence, in the order in which they were added; those that ended leave."""
        added = []
        for lane in (self._decoder, self._other):
            ended = []
            with _evaluating(self._model):
                tokens = lane.step()
            for continuation, token in tokens:
                ends = continuation.put(token)
                ended += [continuation] if ends else []
                added.append(Added(continuation.key, token, ends))
            self._leave(ended, lane)
        return sorted(added)

    def drop(self, key: int) -> None:
        """End a sequence before it ends itself; one that has ended is gone already. Raises KeyError for a key that
        `add` has not given."""
        if not 0 <= key < self._next:
            raise KeyError(key)
        if key in self._live:
            continuation, lane = self._live[key]
            self._leave([continuation], lane)

    def keys(self) -> list[int]:
        """The sequences that go on, in the order in which they were added."""
        return list(self._live)

    def _continuation(self, prompt: list[int], adapters: Names, limit: int, asked: SamplingOptions) -> Continuation:
        start = [self._own.start] if self._own.start is not None else []
        sampler = Sampler(
            asked.temperature, asked.seed, top_k=asked.top_k, top_p=asked.top_p, min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty, forbidden=self._own.forbidden,
            before=start if self._renderer.seq2seq else prompt,
        )  # fmt: skip
        new = Continuation(self._next, prompt, adapters, limit, sampler, self._own.ends)
        if asked.stop:
            tokenizer = self._renderer.tokenizer
            special = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
            new.ends |= {special[stop] for stop in asked.stop if stop in special}
            new.text = Text(tokenizer, asked.stop)
        return new

    def _leave(self, continuations: list[Continuation], lane: Lane) -> None:
        if continuations:
            lane.drop(continuations)
        for continuation in continuations:
            del self._live[continuation.key]

    def _adapters(self, adapter: str | Literal[Adapter.ACTIVE] | None) -> Names:
        record = adapters_of(self._model)
        if adapter is Adapter.ACTIVE:
            return record.active
        refuse_merged(record, "choose the adapter of a sequence")
        if adapter is None:
            return ()
        refuse_unknown(record, adapter)
        return (adapter,)

    def _positions_after(self, prompt: list[int]) -> int:
        """How many tokens can follow a prompt."""
        if not prompt:
            raise DataError("A prompt is empty: there is nothing to go on from.")
        positions = getattr(text_config_of(self._model.config), "max_position_embeddings", None)
        if not isinstance(positions, int) or positions <= 0:
            return 2**62
        start = 0 if self._renderer.seq2seq else len(prompt)
        if len(prompt) > positions or start == positions:
            raise DataError(
                f"A prompt has {len(prompt)} tokens, but the model positions for {positions}: nothing can follow."
            )
        return positions - start


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Answers are those of evaluation, without dropout, also of a model that is being trained."""
    training = [part for part in model.modules() if part.training] if model.training else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def refuse_no_generator(function: str, model: Any) -> None:
    """Raises ArgumentError for what is no model, ModelError for one that says nothing."""
    refuse_no_model(function, model)
    if not (isinstance(model, PreTrainedModel) and model.can_generate()):
        raise ModelError(f"A {type(model).__name__} has no head that generates text; load a causal language model.")
