"""What a person asks → the tokens that generation starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.errors import DataError, ModelError

Messages = list[dict[str, str]]  # a conversation: each message has "role" and "content"


def renderer_for(model: Any, tokenizer: Any) -> Renderer:
    """How prompts become this model's tokens. Raises ModelError for what is no tokenizer."""
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ModelError(
            f"The tokenizer is a {type(tokenizer).__name__}; generate takes the one that veneer.load gives."
        )
    return Renderer(tokenizer, seq2seq=bool(getattr(model.config, "is_encoder_decoder", False)))


def is_one(prompts: Any) -> TypeGuard[str | Messages]:
    """Whether this is one prompt: a text, or one conversation; a list of prompts is not.

    Raises DataError for what is neither.
    """
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, list | tuple):
        raise DataError(
            f"A prompt is a text, a list of messages, or a list of these; {_shown(prompts)} is a "
            f"{type(prompts).__name__}."
        )
    return bool(prompts) and all(isinstance(part, Mapping) for part in prompts)


def encoded(renderer: Renderer, prompt: Any) -> list[int]:
    """The tokens of a text, as it is, or of a conversation in the model's chat template, up to where it answers.

    Raises DataError for anything else, and where the tokenizer has no chat template.
    """
    if isinstance(prompt, str | list | tuple) and not prompt:
        raise DataError("A prompt is empty: there is nothing to go on from.")
    if isinstance(prompt, str):
        return renderer.prompt(Example("The prompt", prompt=prompt)) if renderer.seq2seq else renderer.encode(prompt)
    if not isinstance(prompt, list | tuple):
        raise DataError(f"A prompt is a text or a list of messages; {_shown(prompt)} is a {type(prompt).__name__}.")
    for message in prompt:
        texts = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"The message {_shown(message)} is not an object with role and content (text).")
    return renderer.turn(tuple(dict(message) for message in prompt))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
