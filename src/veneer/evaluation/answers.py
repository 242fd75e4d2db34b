"""What base and adapter answer to the same rows, to be read side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.data.messages import said_in
from veneer.generation.generate import answer_of, continuations
from veneer.generation.likelihood import likeliest
from veneer.runs.opened import as_it_was

_LONGEST = 64  # tokens of an answer


@dataclass(frozen=True)
class Answered:
    """A row and both answers: a classifier's likeliest class, else greedy text, cut where it is long."""

    where: str
    prompt: str
    expected: str
    base: str
    adapter: str
    chosen: bool  # a class


def spread(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """``count`` of them at equal distances, or all: rows of a kind often stand together."""
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def answered(
    model: Any, renderer: Renderer, examples: Sequence[Example], batch_size: int, *, base: Any | None = None
) -> list[Answered]:
    """What the model says to those ``examples`` that ask for an answer, without and with its active adapters; or what
    ``base`` says and then ``model``, where the one is trained into the other."""
    asked = [example for example in examples if example.messages or example.prompt is not None]
    with as_it_was(model, base) as untrained:
        first = _answers(untrained, renderer, asked, batch_size)
    adapter = _answers(model, renderer, asked, batch_size)
    return [
        Answered(example.where, _prompt(example), answer_of(example), before, after, bool(renderer.classes))
        for example, before, after in zip(asked, first, adapter, strict=True)
    ]


def _answers(model: Any, renderer: Renderer, examples: Sequence[Example], batch_size: int) -> list[str]:
    if renderer.classes:
        return likeliest(model, renderer, examples, list(renderer.classes), batch_size)
    room = max(1, renderer.max_length - _LONGEST)  # the end of a longer prompt is kept
    prompts = [renderer.prompt(example)[-room:] for example in examples]
    said: list[str] = []
    for start in range(0, len(prompts), batch_size):
        said += continuations(model, renderer, prompts[start : start + batch_size], max_new_tokens=_LONGEST)
    return [text.strip() for text in said]


def _prompt(example: Example) -> str:
    """As a person reads it: a conversation with who says what."""
    if example.messages:
        return "\n".join(f"{message['role']}: {said_in(message)}" for message in example.asked())
    return (example.prompt or "").strip()
