"""Which layers of a model are kept in codes, and how those of a loaded model are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.frozen.exact import computes_in, hold_in
from veneer.frozen.experts import (
    DenseStack,
    QuantisedStack,
    experts_of,
    is_experts,
    own_experts,
    projections,
    quantise_experts,
    stack_of,
    unknown_experts,
)
from veneer.frozen.new_parts import new_parts, task_parts
from veneer.frozen.read_outside import read_outside
from veneer.frozen.text_part import HEADS as HEADS
from veneer.frozen.text_part import beside_text, end_of
from veneer.frozen.weight import PLAIN_TYPES, STORED, InCodes, QuantisedLinear, StoredLinear, is_plain_linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_COMPUTES = "_veneer_computes_in"


def quantise_linear_layers(model: nn.Module, experts: bool = True, **how: Any) -> None:
    """Keep every layer that `linear_layers` names, and with ``experts`` each of a mixture's, in codes, in place, one
    after another; ``how``: as `quantise`."""
    for name in linear_layers(model):
        made = QuantisedLinear.of(model.get_submodule(name), f"{name}.weight", **how)
        model.set_submodule(name, made)
    for name, module in (experts_of(model) if experts else {}).items():
        quantise_experts(module, name, **how)


def linear_layers(model: nn.Module) -> list[str]:
    """The names of the layers that a quantised storage keeps in codes: the linear ones of the text part but its output
    head, what is new for its task, and those whose weight the model reads itself (`read_outside`)."""
    outside = read_outside(model)
    head = end_of(model, "output")
    modules = dict(model.named_modules())
    new = [*HEADS, *task_parts(model), *new_parts(model, modules)[0]]
    others = tuple(f"{name}." for name in [*beside_text(model), *new])
    return [
        name
        for name, module in modules.items()
        if is_plain_linear(module) and module is not head and not f"{name}.".startswith(others) and name not in outside
    ]


def dense_linear_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers that no storage keeps in codes, since the model reads their weight itself."""
    outside = read_outside(model)
    return [name for name, module in model.named_modules() if name in outside and type(module) in PLAIN_TYPES]


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Multiply in ``dtype``, in place, by weights that stay in the type they are kept in.

    Matrices of linear layers, experts and embeddings stay; all else, which is small, is held in ``dtype``: norms,
    biases, and weights that the model reads itself. Where that rounds them, their own values are kept beside them
    (frozen/exact.py). A classification head computes in fp32, as does what the model's class says must not be in 16
    bits.
    """
    short = dtype is not torch.float32
    # transformers means fp16 alone by the one name, and bf16, too, by the other.
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    apart = {*HEADS, *(strict if short else (getattr(model, "_keep_in_fp32_modules", None) or ()))}
    outside = read_outside(model)
    stay = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(partial(_given_in, dtype))
            stay.add(id(module.weight))
        elif short and _looks_up(module):
            module.register_forward_hook(partial(_given_in, dtype))
        elif short and apart & set(name.split(".")):
            stay |= {id(parameter) for parameter in module.parameters()}
        elif (stored := _stored(module)) and name not in outside and not apart & set(name.split(".")):
            module.__class__ = stored  # in place: what else holds the module, holds it still
            stay.add(id(module.weight))
        elif is_experts(module) and not apart & set(name.split(".")):
            module.__dict__["stored"] = True  # it stays ours when adapters go
            stay |= {id(getattr(own_experts(module), name)) for name in projections(module)}
    exact = {id(parameter): parameter.data for parameter in model.parameters() if parameter.is_floating_point()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in exact and id(parameter) not in stay:
                hold_in(module, name, exact[id(parameter)], dtype)
    model.__dict__[_COMPUTES] = dtype
    if short:
        head_in_fp32(model)


def head_in_fp32(model: nn.Module) -> None:
    """Let the classification head of a model that computes in 16 bits, where it has one, be and compute in fp32, in
    place: it is trained whole."""
    for name, module in model.named_children():
        if name in HEADS:
            computes_in(module.float(), torch.float32)


def compute_of(model: nn.Module) -> torch.dtype:
    """The type that a model computes in."""
    known: torch.dtype | None = model.__dict__.get(_COMPUTES)
    return known or next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def name_of_type(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16; torch's name of another type."""
    return next((name for name, known in DTYPES.items() if known is dtype), str(dtype).removeprefix("torch."))


def computing_said(model: nn.Module) -> list[str]:
    """A sentence about the type that a model computes in, where that is not fp32."""
    dtype = compute_of(model)
    return [] if dtype is torch.float32 else [f"Computing in {name_of_type(dtype)}."]


def gives_in_a_type(hook: Any) -> bool:
    """Whether a module's hook is that of `compute_in`, which gives what is looked up in the type of computing."""
    return isinstance(hook, partial) and hook.func is _given_in


def _stored(module: nn.Module) -> type[nn.Module] | None:
    """The class of ``module`` that multiplies in the type of its input, where it is none of them yet."""
    own = type(module)
    return STORED.get(own) or (StoredLinear if own not in PLAIN_TYPES and is_plain_linear(module) else None)


def _looks_up(module: nn.Module) -> bool:
    """Whether ``module`` gives what it finds in a table that is no parameter: M2M100's places of tokens."""
    tables = [buffer for buffer in module.buffers(recurse=False) if buffer.is_floating_point() and buffer.dim() == 2]
    return bool(tables) and not isinstance(module, InCodes) and next(module.parameters(), None) is None


def _given_in(dtype: torch.dtype, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def type_kept(model: nn.Module) -> torch.dtype:
    """The type in which a model's embedding, and what else is in no codes, is kept."""
    matrices = (module.weight.dtype for module in model.modules() if isinstance(module, nn.Embedding))
    return next(matrices, None) or next(model.parameters()).dtype  # others may be held in the type of computing


def storage_of(model: nn.Module) -> dict[str, Any]:
    """How the weights of a loaded model are kept: the options of `load` that keep them so."""
    dtype = type_kept(model)
    dense = next((name for name, known in DTYPES.items() if known is dtype), "fp32")
    for module in model.modules():
        if isinstance(module, QuantisedLinear | QuantisedStack):
            double = module.nested_scales is not None
            kept = {"storage": module.storage, "block_size": module.block_size, "double_quantisation": double}
            return kept if dense == "fp32" else {**kept, "dense_storage": dense}
    return {"storage": dense}


def without_codes(model: nn.Module) -> str | None:
    """What of a mixture's experts a model in codes keeps as it is, in a sentence for each kind, or None."""
    if not any(isinstance(module, QuantisedLinear | QuantisedStack) for module in model.modules()):
        return None
    sizes: dict[str, int] = {}
    for module in experts_of(model).values():
        for name in projections(module):
            stack = stack_of(module, name)
            if isinstance(stack, DenseStack):
                sizes[f"experts.{name}"] = sizes.get(f"experts.{name}", 0) + stack.weight.numel()
    unknown = unknown_experts(model)
    sentences = (
        [f"{sum(sizes.values()):,} parameters of {', '.join(sizes)} are kept dense, not in codes."] if sizes else []
    )
    if unknown:
        sentences.append(
            f"{sum(unknown.values()):,} parameters of {', '.join(unknown)} are no linear layers of a known kind and "
            f"are not in codes."
        )
    return " ".join(sentences) or None
