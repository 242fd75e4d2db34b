"""What a run, an adapter or a model answers to a prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from veneer.data.formats import Example
from veneer.errors import ConfigError
from veneer.frozen.weight import int8_activations
from veneer.generation.config import GenerateOptions
from veneer.generation.generate import continuations
from veneer.generation.likelihood import choose
from veneer.runs.opened import Opened, open_named
from veneer.updates.record import disabled

_ASKED = "The question"  # where a prompt stands, in a message about it


def answer(source: str, prompt: str, options: GenerateOptions) -> dict[str, str]:
    """ "base", "adapter" or "model" → what it answers to ``prompt``."""
    opened = open_named(source)
    return {name: say(opened, ({"role": "user", "content": prompt},), name, options) for name in sides(opened, options)}


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


def say(
    opened: Opened, messages: tuple[dict[str, str], ...], side: str, options: GenerateOptions,
    on_text: Callable[[str], None] | None = None,
) -> str:  # fmt: skip
    """The answer of one side ("base" is without the adapter) to a conversation, or to its last message alone where
    no chat template is used. ``on_text`` is told each piece of it as it comes."""
    if side == "base":
        with disabled(opened.model):
            return say(opened, messages, "model", options, on_text)
    with int8_activations(opened.model) if options.activations == "int8" else nullcontext():
        return _say(opened, messages, options, on_text)


def _say(
    opened: Opened, messages: tuple[dict[str, str], ...], options: GenerateOptions,
    on_text: Callable[[str], None] | None,
) -> str:  # fmt: skip
    renderer, prompt = opened.renderer, messages[-1]["content"]
    if renderer.classes:
        (name,) = choose(opened.model, renderer, [Example(_ASKED, prompt=prompt)], list(renderer.classes), 1)
        if on_text is not None:
            on_text(name)
        return name
    chat = opened.chat if options.template == "auto" else options.template == "chat"
    ids = renderer.turn(messages) if chat else renderer.prompt(Example(_ASKED, prompt=prompt, answer="a"))
    (text,) = continuations(
        opened.model, renderer, [ids], max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        seed=options.seed, on_text=on_text,
    )  # fmt: skip
    return text
