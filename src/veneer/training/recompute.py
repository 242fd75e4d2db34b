"""Which layers' activations are recomputed for the backward pass instead of kept: all, none, or a given number.

The first layers of the forward pass: by the time the backward pass comes to them, the others' activations are freed,
and what is recomputed has room (Chen et al., 2016, arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from veneer.errors import ConfigError


def stacks_of(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers that transformers can recompute; one in most models, two in an encoder with a decoder."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [
        layers for layers in lists if len(layers) and all(isinstance(m, GradientCheckpointingLayer) for m in layers)
    ]


def keeping_layers(model: nn.Module) -> list[Any]:
    """Layers that store activations for backward, in forward order: from the first on in which, or below which,
    anything is trained."""
    layers = [layer for stack in stacks_of(model) for layer in stack]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    below = {id(p) for p in embedding.parameters()} if (embedding := model_input(model)) is not None else set()
    if any(p.requires_grad for p in model.parameters() if id(p) in below - inside):
        return layers
    first = next((i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), len(layers))
    return layers[first:]


def model_input(model: Any) -> nn.Module | None:
    """The embedding of tokens, below all layers."""
    get = getattr(model, "get_input_embeddings", None)
    embedding: nn.Module | None = get() if get is not None else None
    return embedding


@contextmanager
def recomputed(model: Any, count: int | None, **how: Any) -> Iterator[None]:
    """Inside, ``count`` of the layers that keep anything keep their input alone while the model trains; None: all.

    ``how``: of torch's checkpoint. Raises ConfigError for a model without such layers, where some are wanted.
    """
    chosen = keeping_layers(model)[:count]
    if not chosen and count != 0 and not stacks_of(model):
        raise ConfigError(f"A {type(model).__name__} has no layers whose activations could be recomputed.")
    for layer in chosen:
        # What model.gradient_checkpointing_enable would do to all layers, and to those below the lowest adapter.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, **how)
        layer.gradient_checkpointing = True
    try:
        yield
    finally:
        for layer in chosen:
            layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func


def all_recomputed(model: nn.Module) -> bool:
    """Whether no layer keeps more than its input."""
    layers = keeping_layers(model)
    return bool(layers) and all(layer.gradient_checkpointing for layer in layers)
