"""What a run, an adapter or a model answers to a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from veneer.data.formats import Example
from veneer.errors import ConfigError
from veneer.frozen.layers import computing_said
from veneer.frozen.weight import int8_activations
from veneer.generation.config import GenerateOptions
from veneer.generation.likelihood import Said, class_answer
from veneer.generation.own_settings import not_followed
from veneer.generation.stream import pieces
from veneer.runs.opened import Opened, open_named
from veneer.updates.record import disabled

_ASKED = "The question"  # what a message calls the prompt


@dataclass(frozen=True)
class Answer:
    """What one side answers: a text, or what a classifier says, with the probabilities of all its labels."""

    text: str
    probabilities: dict[str, float] | None = None
    shown: str = ""  # as a person reads it, where that is not the text

    def __str__(self) -> str:
        return self.shown or self.text


def answer(source: str | Path, prompt: str, **options: Any) -> dict[str, str]:
    """ "base", "adapter" or "model" → what a run, an adapter or a model answers to ``prompt``.

    ``options``: those of `GenerateOptions`. Raises ConfigError for an option that does not exist or makes no sense, and
    ModelError for what is no model.

    Example:
        >>> answers = answer("runs/first", "A ripe plum:", both=True, max_new_tokens=8)
        >>> list(answers)
        ['base', 'adapter']
    """
    return {name: side.text for name, side in answers(source, prompt, **options).items()}


def answers(source: str | Path, prompt: str, **options: Any) -> dict[str, Answer]:
    """`answer`, with a classifier's probabilities."""
    asked = GenerateOptions(**options)
    opened = with_asked_system(open_named(source, asked.compute, asked.device), asked)
    question = ({"role": "user", "content": prompt},)
    names = sides(opened, asked)
    say_what_is_not_followed(opened, asked)
    if opened.renderer.classes:
        by_side = {name: _of_classifier(opened, prompt, name) for name in names}
        return {name: Answer(said.text, said.probabilities or None, str(said)) for name, said in by_side.items()}
    return {name: Answer("".join(said(opened, question, name, asked))) for name in names}


def with_asked_system(opened: Opened, asked: GenerateOptions) -> Opened:
    """The same, asked with this system message. Raises ConfigError where no chat template would have it."""
    if asked.system is None:
        return opened
    if opened.renderer.classes or not _in_chat(opened, asked):
        raise ConfigError(
            "system goes into a chat template, and the question is asked without one; leave it out, or give template "
            "chat."
        )
    return replace(opened, renderer=replace(opened.renderer, system=asked.system))


def _in_chat(opened: Opened, asked: GenerateOptions) -> bool:
    return opened.chat if asked.template == "auto" else asked.template == "chat"


def say_what_is_not_followed(opened: Opened, asked: GenerateOptions) -> None:
    """Lines on standard error about settings of the model that would change an answer elsewhere, and about the type of
    computing, where that is not fp32."""
    for note in computing_said(opened.model):
        click.echo(note, err=True)
    if not opened.renderer.classes and (note := not_followed(opened.model, asked)):
        click.echo(note, err=True)


def _of_classifier(opened: Opened, prompt: str, side: str) -> Said:
    with disabled(opened.model) if side == "base" else nullcontext():
        return class_answer(opened.model, opened.renderer, Example(_ASKED, prompt=prompt))


def sides(opened: Opened, options: GenerateOptions) -> list[str]:
    """Which answers were asked for. Raises ConfigError when there is no adapter to compare with."""
    if options.base and options.both:
        raise ConfigError("Give --base or --both, not both of them.")
    if opened.own_weights and (options.base or options.both):
        raise ConfigError(
            "The run trained the model's own weights, so its base is not in it; ask the base by its own name, without "
            "--base or --both."
        )
    if not opened.adapted:
        if options.both:
            raise ConfigError("--both needs a run or an adapter; this is a model without one.")
        return ["model"]
    return ["base", "adapter"] if options.both else ["base"] if options.base else ["adapter"]


def said(
    opened: Opened, messages: tuple[dict[str, str], ...], side: str, options: GenerateOptions
) -> Iterator[str]:  # fmt: skip
    """The answer of one side ("base" is without the adapter) to a conversation, or to its last message alone where
    no chat template is used, in pieces as they come."""
    with int8_activations(opened.model) if options.activations == "int8" else nullcontext():
        yield from _said(opened, messages, side, options)


def _said(
    opened: Opened, messages: tuple[dict[str, str], ...], side: str, options: GenerateOptions
) -> Iterator[str]:  # fmt: skip
    renderer, prompt = opened.renderer, messages[-1]["content"]
    if renderer.classes:
        yield str(_of_classifier(opened, prompt, side))
        return
    as_it_is = Example(_ASKED, prompt=prompt, answer="a")
    ids = renderer.turn(messages) if _in_chat(opened, options) else renderer.prompt(as_it_is)
    adapter: dict[str, Any] = {"adapter": None} if side == "base" else {}
    yield from pieces(opened.model, renderer, ids, **options.sampling(), **adapter)
