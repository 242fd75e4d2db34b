"""What a model says: greedy or sampled continuations, several prompts at once, or piece by piece."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.errors import ArgumentError
from veneer.generation.config import SamplingOptions
from veneer.generation.own_settings import not_followed
from veneer.generation.prompts import Messages, encoded, is_one, renderer_for
from veneer.generation.session import Session, refuse_no_generator
from veneer.generation.stream import pieces
from veneer.generation.text import answer_text
from veneer.options import shows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from veneer.generation.arguments import SamplingArguments

_SAMPLING = [name for name in SamplingOptions.model_fields if name != "max_new_tokens"]


@overload
def generate(
    model: Any, tokenizer: Any, prompts: str | Messages, *, max_new_tokens: int = 64, **how: Unpack[SamplingArguments]
) -> str: ...
@overload
def generate(
    model: Any, tokenizer: Any, prompts: list[str] | list[Messages], *, max_new_tokens: int = 64,
    **how: Unpack[SamplingArguments],
) -> list[str]: ...  # fmt: skip
@shows(SamplingOptions, _SAMPLING)
def generate(
    model: Any, tokenizer: Any, prompts: str | Messages | list[str] | list[Messages], *, max_new_tokens: int = 64,
    **how: Unpack[SamplingArguments],
) -> str | list[str]:  # fmt: skip
    """What a language model says after a prompt, without special tokens; after each of a list of prompts, a list.

    A prompt is a text, which the model goes on from as it is, or a conversation: a list of messages with "role" and
    "content", rendered with the model's chat template. ``max_new_tokens``: the longest answer. Without a
    ``temperature`` it is greedy; with one each prompt's tokens are drawn by a generator of its own, so that a prompt
    gets the same text alone and in a list. A `UserWarning` names what the model's generation_config.json sets and
    Veneer does not follow.

    Models of Llama's kind generate by the C++ kernels, with their adapters, over fp32 and quantised bases, and inside
    `int8_activations` faster still; all others by PyTorch. Raises ArgumentError for a model, a tokenizer or a prompt
    that is none, DataError for a prompt that is empty or fills the model's positions, ModelError for a model that
    generates no text or whose logits are not finite, ConfigError for a value that makes no sense.

    Example:
        >>> model, tokenizer = veneer.load("smollm2-135m-instruct")
        >>> question = [{"role": "user", "content": "What is the capital of France?"}]
        >>> veneer.generate(model, tokenizer, question, max_new_tokens=12)
        'The capital of France is Paris.'
        >>> veneer.generate(model, tokenizer, ["A, B,"], max_new_tokens=2)
        [' C,']
        >>> veneer.generate(model, tokenizer, question, stop=" is ")
        'The capital of France'
    """
    asked = _asked("generate", model, max_new_tokens, how)
    renderer = renderer_for("generate", model, tokenizer)
    if is_one(prompts):
        return continuations(model, renderer, [encoded(renderer, prompts)], **asked)[0]
    return continuations(model, renderer, [encoded(renderer, prompt) for prompt in prompts], **asked)


@shows(SamplingOptions, _SAMPLING)
def stream(
    model: Any, tokenizer: Any, prompt: str | Messages, *, max_new_tokens: int = 64, **how: Unpack[SamplingArguments]
) -> Iterator[str]:
    """What `generate` says after one prompt, in pieces of text as they come. Raises as it does, before the first piece.

    Example:
        >>> model, tokenizer = veneer.load("smollm2-135m-instruct")
        >>> for piece in veneer.stream(model, tokenizer, "A, B,", max_new_tokens=2):
        ...     print(piece)
         C
        ,
    """
    asked = _asked("stream", model, max_new_tokens, how)
    renderer = renderer_for("stream", model, tokenizer)
    if not is_one(prompt):
        raise ArgumentError("stream answers one prompt, a str or a list of messages; generate answers several.")
    return pieces(model, renderer, encoded(renderer, prompt), **asked)


def _asked(function: str, model: Any, max_new_tokens: int, how: SamplingArguments) -> dict[str, Any]:
    refuse_no_generator(function, model)
    asked = SamplingOptions(max_new_tokens=max_new_tokens, **how)
    if note := not_followed(model, asked):
        warnings.warn(note, stacklevel=3)
    return asked.sampling()


def continuations(
    model: Any, renderer: Renderer, prompts: list[list[int]], *, max_new_tokens: int, stop: str | Sequence[str] = (),
    **how: Any,
) -> list[str]:  # fmt: skip
    """The text after each prompt (token ids), without special tokens.

    ``how``: the other options that `Session.add` takes, which says what is raised; with a ``temperature`` the tokens of
    each prompt are drawn by a generator of its own.
    """
    session, stops = Session(model, renderer), [stop] if isinstance(stop, str) else list(stop)
    keys = [session.add(prompt, max_new_tokens=max_new_tokens, stop=stops, **how) for prompt in prompts]
    tokens: dict[int, list[int]] = {key: [] for key in keys}
    while session.keys():
        for added in session.step():
            tokens[added.key].append(added.token)
    return [answer_text(renderer.tokenizer, ids, stops) for ids in tokens.values()]


def exact_matches(model: Any, renderer: Renderer, examples: Sequence[Example], batch_size: int) -> list[bool]:
    """Whether the greedy continuation of each prompt is its answer, apart from space around it."""
    matches = [False] * len(examples)
    prompts = [renderer.prompt(example) for example in examples]
    answers = [renderer.answer(example) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        longest = max(len(renderer.encode(answers[i])) for i in part)
        # Two tokens more than the longest answer show that a continuation does not end where it should.
        room = max(1, renderer.max_length - longest - 2)  # the end of a longer prompt is kept
        said = continuations(model, renderer, [prompts[i][-room:] for i in part], max_new_tokens=longest + 2)
        for i, text in zip(part, said, strict=True):
            matches[i] = text.strip() == answers[i]
    return matches


def answer_of(example: Example) -> str:
    """The right answer: the assistant's last one in a conversation, or the completion."""
    return example.last_answer()
