"""Weights that are one tensor: an output head that is the embedding."""

from __future__ import annotations

from typing import Any

from torch import nn


def tie(model: Any, missing: set[str]) -> None:
    """Let tied weights be one tensor as the config says, except where the checkpoint holds both and they differ.

    ``missing``: the model's tensors that the checkpoint lacks. The rule is transformers' own.
    """
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)


def note_untied(model: Any) -> list[str]:
    """Let the config say of a loaded model that its head is not its embedding, where it said otherwise: what ties the
    weights later would replace the head. A sentence for a person, or none where nothing was changed.

    An encoder-decoder's config is left as it is, since its forward pass reads it.
    """
    apart = sorted(key for key in _said_to_be_tied(model) if key not in (model.all_tied_weights_keys or {}))
    if not apart or model.config.is_encoder_decoder:
        return []
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", None):
            config.tie_word_embeddings = False
    return [
        f"{', '.join(apart)} is not the embedding, as config.json says: the checkpoint holds another one, used here."
    ]


def _said_to_be_tied(model: Any) -> dict[str, str]:
    tied = getattr(model, "get_expanded_tied_weights_keys", None)
    said: dict[str, str] = tied(all_submodels=True) if tied is not None and isinstance(model, nn.Module) else {}
    return said
