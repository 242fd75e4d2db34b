"""A model's passes replaced, while it trains, by those that keep less for the backward pass or are done faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral import modeling_mistral
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from veneer.frozen.weight import frozen_product, frozen_weight
from veneer.kernels.dense import swift_products
from veneer.kernels.elementwise import rms_norm, rotate, swiglu
from veneer.training.again import again, computed_again

# Types whose forward is known to be weight · norm(x), and down(silu(gate(x)) · up(x)). A subclass may do more.
NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
_ROTATING: tuple[Any, ...] = (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3)
_GATED = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)


@contextmanager
def fused_passes(model: nn.Module) -> Iterator[None]:
    """Inside, the norms and gated layers of the known types compute the same with less memory and fewer passes, and
    frozen linear layers the same but for the last bits.

    A module of another type, one that is trained, or a gate that is not SiLU keeps its own forward. Activation
    checkpointing, where it is wanted, is to be on before.
    """
    # A checkpointed layer keeps nothing, so there is nothing to keep less of.
    checkpointed = getattr(model, "is_activation_checkpointing", False)
    fused = [(module, forward) for module in model.modules() if (forward := _fused_forward(module)) is not None]
    for module, forward in fused:
        module.forward = forward
    try:
        with swift_products(), _rotations(), nullcontext() if checkpointed else computed_again():
            yield
    finally:
        for module, _ in fused:
            del module.forward  # the class's own stands again


def _fused_forward(module: Any) -> Callable[[Tensor], Tensor] | None:
    if "forward" in module.__dict__:
        return None  # somebody else's hook stands there
    if type(module) is nn.Linear and not any(parameter.requires_grad for parameter in module.parameters()):
        return lambda x: frozen_product(x, frozen_weight(module), module.bias)
    if type(module) in NORMS and not module.weight.requires_grad:
        return lambda x: _normed(module, x)
    if type(module) in _GATED and is_silu(module.act_fn):
        return lambda x: _gated(module, x)
    return None


def fused_types(model: nn.Module) -> dict[str, int]:
    """Type of module → how many of ``model`` compute in fewer passes while it trains, unless they are trained whole."""
    kinds = [type(module) for module in model.modules() if type(module) not in _GATED or is_silu(module.act_fn)]
    homes = {home.__name__ for home in _ROTATING}
    rotating = {kind for kind in kinds if kind.__module__ in homes and kind.__name__.endswith("Attention")}
    return dict(Counter(kind.__name__ for kind in kinds if kind in (*NORMS, *_GATED, *rotating)))


@contextmanager
def _rotations() -> Iterator[None]:
    """Inside, the attention of the known types rotates queries and keys in one pass each."""
    before = [module.apply_rotary_pos_emb for module in _ROTATING]
    for module in _ROTATING:
        module.apply_rotary_pos_emb = _rotated
    try:
        yield
    finally:
        for module, function in zip(_ROTATING, before, strict=True):
            module.apply_rotary_pos_emb = function


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    assert unsqueeze_dim == 1, "heads stand before tokens in all of them"
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _normed(module: Any, x: Tensor) -> Tensor:
    weight, eps, kept = module.weight, module.variance_epsilon, x.detach()
    return again(rms_norm(x, weight, eps), lambda: rms_norm(kept, weight, eps))


def _gated(module: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x)), whose inner product would be as large as either of its factors, which are kept."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    kept = gate.detach(), up.detach()
    return module.down_proj(again(swiglu(gate, up), lambda: swiglu(*kept)))  # type: ignore[no-any-return]


def is_silu(activation: Any) -> bool:
    """Whether a gate is x · sigmoid(x)."""
    return activation is F.silu or type(activation) in (nn.SiLU, SiLUActivation)
