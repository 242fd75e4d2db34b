"""What is known of transformers' modules by their types: norms, gated layers, rotations, activations."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation, SiLUActivation


def _types(suffix: str, *models: str) -> frozenset[str]:
    """Their full names, as transformers has them. A model brings the module that it is made of with it; to import all
    of these would take a quarter of a second of every start."""
    parts = [model.split(".") for model in models]
    return frozenset(f"transformers.models.{home}.modeling_{home}.{name}{suffix}" for home, name in parts)


# Types whose forward is known. A subclass may do more.
NORMS = _types("RMSNorm", "llama.Llama", "mistral.Mistral", "phi3.Phi3", "qwen2.Qwen2", "qwen3.Qwen3")  # w · norm(x)


NORMS_BESIDE_ONE = _types("RMSNorm", "gemma.Gemma", "gemma2.Gemma2", "gemma3.Gemma3")  # (1 + weight) · norm(x)


HALVED = _types("MLP", "phi3.Phi3")  # gate and up are halves of one layer's output


GATED_LAYERS = HALVED | _types(  # down(act(gate(x)) · up(x))
    "MLP", "llama.Llama", "mistral.Mistral", "qwen2.Qwen2", "qwen3.Qwen3", "gemma.Gemma", "gemma2.Gemma2",
    "gemma3.Gemma3",
)  # fmt: skip


# Modules whose attention rotates by apply_rotary_pos_emb.
ROTATING = {
    f"transformers.models.{home}.modeling_{home}"
    for home in ("gemma", "gemma2", "gemma3", "gpt_neox", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")
}


TANH_GELUS = (NewGELUActivation, FastGELUActivation, GELUTanh)


def name_of(module: nn.Module) -> str:
    """The full name of its type."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def activation_of(module: Any) -> Any:
    return module.activation_fn if name_of(module) in HALVED else module.act_fn


def is_silu(activation: Any) -> bool:
    """Whether a gate is x · sigmoid(x)."""
    return activation is F.silu or type(activation) in (nn.SiLU, SiLUActivation)
