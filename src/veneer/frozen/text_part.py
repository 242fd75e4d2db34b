"""A model that takes images or sound beside text: its text part, and the parts that text does not pass through."""

from __future__ import annotations

from typing import Any

from torch import nn

HEADS = ("classifier", "score", "classification_head")  # of sequence-classification models


def text_config_of(config: Any) -> Any:
    """The text part's config of a model that takes other input, too, as transformers has it; any other's own."""
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # of several text parts none is the model's own
        return config


def is_composite(config: Any) -> bool:
    """Whether a model of this config has a text part among others."""
    return text_config_of(config) is not config


def text_part(model: Any) -> Any:
    """The module that makes last hidden states of tokens: a composite model's decoder, any other's body."""
    body = model.base_model
    return model.get_decoder().base_model if is_composite(getattr(model, "config", None)) else body


def beside_text(model: Any) -> list[str]:
    """The names of a composite model's other parts, such as a vision tower and what joins it to the text; of any other
    model none. They are what stands beside the decoder, the embedding and the head on the way to them."""
    if not is_composite(getattr(model, "config", None)):
        return []
    ends = end_of(model, "input"), end_of(model, "output")
    if ends[0] is None:  # two towers side by side, as CLIP has them: none is beside the other
        return []
    kept = [id(module) for module in (model.get_decoder(), *ends) if module is not None]
    return _beside(model, "", set(kept))


def end_of(model: Any, end: str) -> Any:
    """The module that embeds the ``input``'s tokens, or makes the ``output``'s logits; None where a model has none."""
    try:
        return getattr(model, f"get_{end}_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):  # what transformers' models without one answer
        return None


def _beside(module: nn.Module, path: str, kept: set[int]) -> list[str]:
    names = []
    for name, child in module.named_children():
        if id(child) in kept or (not path and name in HEADS):
            continue
        if kept & {id(inner) for inner in child.modules()}:
            names += _beside(child, f"{path}{name}.", kept)
        elif next(child.parameters(), None) is not None:
            names.append(f"{path}{name}")
    return names


def say_tied(config: Any, tied: bool) -> None:
    """Write into a config whether embedding and head are one matrix; a composite one says it at two places."""
    config.tie_word_embeddings = tied
    text = text_config_of(config)
    if text is not config:
        text.tie_word_embeddings = tied
