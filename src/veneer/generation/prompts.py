"""What a person asks → the tokens that generation starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from veneer.arguments import described
from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.errors import ArgumentError, DataError

Messages = list[dict[str, str]]  # a conversation: each message has "role" and "content"


def renderer_for(function: str, model: Any, tokenizer: Any) -> Renderer:
    """How prompts become this model's tokens. Raises ArgumentError for what is no tokenizer."""
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ArgumentError(f"{function} takes the model's tokenizer as tokenizer, not {described(tokenizer)}.")
    return Renderer(tokenizer, seq2seq=bool(getattr(model.config, "is_encoder_decoder", False)))


def is_one(prompts: Any) -> TypeGuard[str | Messages]:
    """Whether this is one prompt: a text, or one conversation; a list of prompts is not.

    Raises ArgumentError for what is neither.
    """
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, list | tuple):
        raise ArgumentError(f"A prompt is a str, a list of messages, or a list of these, not {described(prompts)}.")
    return bool(prompts) and all(isinstance(part, Mapping) for part in prompts)


def encoded(renderer: Renderer, prompt: Any) -> list[int]:
    """The tokens of a text, as it is, or of a conversation in the model's chat template, up to where it answers.

    Raises ArgumentError for anything else, DataError for what is empty and where there is no chat template.
    """
    if isinstance(prompt, str | list | tuple) and not prompt:
        raise DataError("A prompt is empty: there is nothing to go on from.")
    if isinstance(prompt, str):
        return renderer.prompt(Example("The prompt", prompt=prompt)) if renderer.seq2seq else renderer.encode(prompt)
    if not isinstance(prompt, list | tuple):
        raise ArgumentError(f"A prompt is a str or a list of messages, not {described(prompt)}.")
    for message in prompt:
        texts = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ArgumentError(f"A message has a role and a content, both str; this is {described(message)}.")
    return renderer.turn(tuple(dict(message) for message in prompt))
