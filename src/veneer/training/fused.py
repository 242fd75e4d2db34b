"""A model's passes replaced, while it trains, by those that keep less for the backward pass or are done faster.

Replaced are the forward passes of this model's own modules, each an attribute of the module: another model of the
process, of the same types or not, computes what it always does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUTanh

from veneer.frozen.called import SameForward
from veneer.frozen.weight import STORED, frozen_product, frozen_weight
from veneer.kernels.dense import linear
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
from veneer.training.recipes import Recipes, recipes_for
from veneer.training.recompute import all_recomputed
from veneer.updates.layers import AdaptedLinear
from veneer.updates.product import drawn_seed

_EXACT = (torch.float32, torch.float64)  # where a formula's operations need not be rounded one by one, as its own are
_ROTATION = "apply_rotary_pos_emb"  # what the forward passes of attention call it, in all of transformers
_LINEAR = (nn.Linear, *STORED.values())
_Pass = Callable[[Any, Recipes, Tensor], Tensor]


@contextmanager
def fused_passes(model: nn.Module, draw: Callable[[], int] = drawn_seed) -> Iterator[None]:
    """Inside, the norms, gated layers, activations and rotations of the known types compute the same with less memory
    and fewer passes, and frozen linear layers the same except for the last bits.

    A module of another type, one that is trained, or a gate of another activation keeps its own forward. Activation
    checkpointing, where it is wanted, is to be on before. ``draw`` gives the seeds of dropout in adapted linear layers.
    """
    # A checkpointed layer keeps nothing, so there is nothing to keep less of.
    checkpointed = all_recomputed(model)
    with recipes_for(model) as recipes:
        fused = list(_fused_forwards(model, recipes, draw))
        for module, forward in fused:
            module.forward = forward
        try:
            with nullcontext() if checkpointed else recipes.used():
                yield
        finally:
            for module, _ in fused:
                del module.forward  # the class's own is back


def _fused_forwards(
    model: nn.Module, recipes: Recipes, draw: Callable[[], int]
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Each module that gets another forward pass, and that pass."""
    rotated: dict[FunctionType, FunctionType] = {}
    for module in model.modules():
        if "forward" in module.__dict__:
            continue  # somebody else's hook
        own = _rotating_forward(module)
        if own is not None:
            if own not in rotated:
                rotated[own] = _with_rotation(own)
            yield module, MethodType(rotated[own], module)
        elif type(module) is AdaptedLinear:
            yield module, _adapted(module, draw)
        elif (known := _pass_of(module)) is not None and not _is_trained(module):
            yield module, _bound(known, module, recipes)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _bound(known: _Pass, module: nn.Module, recipes: Recipes) -> Callable[[Tensor], Tensor]:
    return SameForward(known, module, recipes)


def _adapted(module: AdaptedLinear, draw: Callable[[], int]) -> Callable[[Tensor], Tensor]:
    return lambda x: AdaptedLinear.forward(module, x, linear, draw)


def _pass_of(module: Any) -> _Pass | None:
    """What computes the frozen module's own formula faster, in fewer passes, or keeping less; None where it is not
    known."""
    return _multiplied if type(module) in _LINEAR else _formula_of(module)


def _formula_of(module: Any) -> _Pass | None:
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
    inside = {id(activation_of(module)) for module in model.modules() if _formula_of(module) is _gated}
    names = [
        type(module).__name__
        for module in model.modules()
        if (_formula_of(module) is not None and id(module) not in inside) or _rotating_forward(module) is not None
    ]
    return dict(Counter(names))


def _rotating_forward(module: nn.Module) -> FunctionType | None:
    """The forward pass of its type, where that rotates queries and keys as one of the known modules of transformers."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or forward.__globals__.get("__name__") not in ROTATING:
        return None
    return forward if _ROTATION in forward.__code__.co_names else None


def _with_rotation(forward: FunctionType) -> FunctionType:
    """The same function, in which one name means another one: queries and keys are rotated in one pass each."""
    names = {**forward.__globals__, _ROTATION: _rotated}
    derived = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    derived.__kwdefaults__ = forward.__kwdefaults__
    return derived


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    assert unsqueeze_dim == 1, "heads come before tokens in all of them"
    return _rotated_in_part(q, cos, sin), _rotated_in_part(k, cos, sin)


def _rotated_in_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As many of the first dimensions as there are angles for, which in most models are all."""
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat([rotate(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)


def _multiplied(module: Any, recipes: Recipes, x: Tensor) -> Tensor:
    return frozen_product(x, frozen_weight(module, linear), module.bias)


def _normed(module: Any, recipes: Recipes, x: Tensor) -> Tensor:
    return recipes.made(lambda x: rms_norm(x, module.weight, module.variance_epsilon), x)


def _normed_beside_one(module: Any, recipes: Recipes, x: Tensor) -> Tensor:
    weight = 1 + module.weight.to(torch.promote_types(module.weight.dtype, torch.float32))
    return recipes.made(lambda x: rms_norm(x, weight, module.eps, once=True), x)


def _centred(module: Any, recipes: Recipes, x: Tensor) -> Tensor:
    how = module.normalized_shape, module.weight, module.bias, module.eps
    return recipes.made(lambda x: F.layer_norm(x, *how), x)


def _activated(module: Any, recipes: Recipes, x: Tensor) -> Tensor:
    if x.dtype not in _EXACT:
        return type(module).forward(module, x)  # type: ignore[no-any-return]  # some of them round in every operation
    return recipes.made(lambda x: F.gelu(x, approximate="tanh"), x)


def _gated(module: Any, recipes: Recipes, x: Tensor) -> Tensor:
    """down(act(gate(x)) · up(x)), whose inner product would be as large as either of its factors, which are kept."""
    product = _gate_of(activation_of(module))
    assert product is not None
    if name_of(module) in HALVED:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(recipes.made(product, gate, up))  # type: ignore[no-any-return]


def _gate_of(activation: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    if is_silu(activation):
        return swiglu
    return geglu if type(activation) is GELUTanh else None
