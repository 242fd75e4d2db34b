"""A model's passes replaced, while it trains, by those that keep less for the backward pass or are done faster."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUTanh

from veneer.frozen.weight import frozen_product, frozen_weight
from veneer.kernels.dense import swift_products
from veneer.kernels.operations.gates import differentiable_geglu as geglu
from veneer.kernels.operations.gates import differentiable_swiglu as swiglu
from veneer.kernels.operations.norm import differentiable_rms_norm as rms_norm
from veneer.kernels.operations.rotation import differentiable_rotate as rotate
from veneer.models.parts import (
    GATED_LAYERS,
    HALVED,
    NORMS,
    NORMS_BESIDE_ONE,
    ROTATING,
    TANH_GELUS,
    activation_of,
    is_silu,
    name_of,
)
from veneer.training.again import again_from, computed_again
from veneer.training.recompute import all_recomputed

_EXACT = (torch.float32, torch.float64)  # where a formula's operations need not be rounded one by one, as its own are


@contextmanager
def fused_passes(model: nn.Module) -> Iterator[None]:
    """Inside, the norms, gated layers and activations of the known types compute the same with less memory and fewer
    passes, and frozen linear layers the same but for the last bits.

    A module of another type, one that is trained, or a gate of another activation keeps its own forward. Activation
    checkpointing, where it is wanted, is to be on before.
    """
    # A checkpointed layer keeps nothing, so there is nothing to keep less of.
    checkpointed = all_recomputed(model)
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
    if type(module) is nn.Linear:
        known: Callable[[Any, Tensor], Tensor] | None = _multiplied
    else:
        known = _pass_of(module)
    if known is None or any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return None
    return lambda x: known(module, x)


def _pass_of(module: Any) -> Callable[[Any, Tensor], Tensor] | None:
    """What computes the module's own formula in fewer passes, or keeping less; None where it is not known."""
    kind, name = type(module), name_of(module)
    if name in NORMS:
        return _normed
    if name in NORMS_BESIDE_ONE:
        return _normed_beside_one
    if kind is nn.LayerNorm:
        return _centred
    if name in GATED_LAYERS and _gate_of(activation_of(module)) is not None:
        return _gated
    if kind in TANH_GELUS:
        return _activated
    return None


def fused_types(model: nn.Module) -> dict[str, int]:
    """Type of module → how many of ``model`` compute in fewer passes, or keep less, while it trains, unless they are
    trained whole."""
    inside = {id(activation_of(module)) for module in model.modules() if _pass_of(module) is _gated}
    found = [
        type(module).__name__
        for module in model.modules()
        if (_pass_of(module) is not None and id(module) not in inside)
        or (type(module).__module__ in ROTATING and type(module).__name__.endswith("Attention"))
    ]
    return dict(Counter(found))


@contextmanager
def _rotations() -> Iterator[None]:
    """Inside, the attention of the known types rotates queries and keys in one pass each."""
    there = [module for name, module in list(sys.modules.items()) if name in ROTATING]
    before = [module.apply_rotary_pos_emb for module in there]
    for module in there:
        module.apply_rotary_pos_emb = _rotated  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, function in zip(there, before, strict=True):
            module.apply_rotary_pos_emb = function  # type: ignore[attr-defined]


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    assert unsqueeze_dim == 1, "heads stand before tokens in all of them"
    return _rotated_in_part(q, cos, sin), _rotated_in_part(k, cos, sin)


def _rotated_in_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As many of the first dimensions as there are angles for, which in most models are all."""
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat([rotate(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)


def _multiplied(module: Any, x: Tensor) -> Tensor:
    return frozen_product(x, frozen_weight(module), module.bias)


def _normed(module: Any, x: Tensor) -> Tensor:
    return again_from(lambda x: rms_norm(x, module.weight, module.variance_epsilon), x)


def _normed_beside_one(module: Any, x: Tensor) -> Tensor:
    if x.dtype != module.weight.dtype or x.dtype not in _EXACT:
        return type(module).forward(module, x)  # type: ignore[no-any-return]  # it rounds once, after the weight
    weight = 1 + module.weight
    return again_from(lambda x: rms_norm(x, weight, module.eps), x)


def _centred(module: Any, x: Tensor) -> Tensor:
    how = module.normalized_shape, module.weight, module.bias, module.eps
    return again_from(lambda x: F.layer_norm(x, *how), x)


def _activated(module: Any, x: Tensor) -> Tensor:
    if x.dtype not in _EXACT:
        return type(module).forward(module, x)  # type: ignore[no-any-return]  # some of them round in every operation
    return again_from(lambda x: F.gelu(x, approximate="tanh"), x)


def _gated(module: Any, x: Tensor) -> Tensor:
    """down(act(gate(x)) · up(x)), whose inner product would be as large as either of its factors, which are kept."""
    product = _gate_of(activation_of(module))
    assert product is not None
    if name_of(module) in HALVED:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(again_from(product, gate, up))  # type: ignore[no-any-return]


def _gate_of(activation: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    if is_silu(activation):
        return swiglu
    return geglu if type(activation) is GELUTanh else None
