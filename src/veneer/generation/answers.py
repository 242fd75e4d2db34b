"""What a model answers to rows, to be measured: greedy text, or what a classifier says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.data.metrics import Metric
from veneer.errors import ConfigError, DataError
from veneer.generation.generate import continuations
from veneer.generation.likelihood import labels_said, likeliest, numbers_said
from veneer.generation.session import refuse_no_generator

_LEAST = 2  # tokens more than the longest right answer, which show that an answer does not end where it should


def measured_answers(
    metrics: Sequence[Metric], model: Any, renderer: Renderer, examples: Sequence[Example], batch_size: int
) -> dict[str, float]:
    """Metric → its value for what the model, as it is, answers to these ``examples``; none without metrics.

    Raises DataError for rows that ask for no answer, or have one that is better than another; ConfigError for a metric
    of texts and a model that gives numbers.
    """
    if not metrics:
        return {}
    for example in examples:
        if example.is_judged or not (example.messages or example.prompt is not None):
            what = "says which answer is better" if example.is_judged else "is plain text"
            raise DataError(f"{example.where} {what}, so there is no one right answer to measure by a metric.")
    named = [metric.name for metric in metrics if ":" not in metric.name]
    if renderer.problem == "regression" and named:
        raise ConfigError(f"{named[0]} compares texts, and the model gives numbers; take a function of your own.")
    answers = answers_to(model, renderer, examples, batch_size)
    return {metric.name: metric.of(answers, examples) for metric in metrics}


def answers_to(model: Any, renderer: Renderer, examples: Sequence[Example], batch_size: int) -> list[Any]:
    """The greedy answer to each example, without space around it, of at most half as many tokens more than the longest
    right one has; of a classifier its class, all the labels, or the number."""
    if renderer.problem == "regression":
        return [*numbers_said(model, renderer, examples, batch_size)]
    if renderer.problem == "multi-label":
        return [*labels_said(model, renderer, examples, batch_size)]
    if renderer.classes:
        return [*likeliest(model, renderer, examples, [*renderer.classes], batch_size)]
    refuse_no_generator("metrics", model)
    longest = max(len(renderer.encode(renderer.answer(example))) for example in examples)
    most = longest + max(_LEAST, longest // 2)
    room = max(1, renderer.max_length - most)  # the end of a longer prompt is kept
    prompts = [renderer.prompt(example)[-room:] for example in examples]
    order, said = sorted(range(len(prompts)), key=lambda number: len(prompts[number])), [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        texts = continuations(model, renderer, [prompts[number] for number in part], max_new_tokens=most)
        for number, text in zip(part, texts, strict=True):
            said[number] = text.strip()
    return said
