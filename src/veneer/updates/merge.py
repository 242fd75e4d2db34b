"""Fold the active updates into the base weights, so that they cost nothing, and take them out again to the last bit.

W = W0 + Σ s · B A is summed in fp32 at least and rounded once to the base's type. The original bytes are kept for
`unmerge`, not computed back: (W0 + ΔW) − ΔW is not W0 in floating point.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.arguments import refuse_no_model
from veneer.device import META
from veneer.errors import TargetError
from veneer.frozen.experts import Experts, is_experts, projections, stack_of
from veneer.frozen.new_parts import marked_as
from veneer.frozen.text_part import say_tied
from veneer.frozen.weight import STORED, QuantisedLinear, frozen_weight
from veneer.updates.attach import forget_adapters
from veneer.updates.convolutions import CONVOLUTIONS, refuse_groups
from veneer.updates.experts import merged_experts
from veneer.updates.fast_path import call_every_layer
from veneer.updates.inner import inner_model
from veneer.updates.layers import Adapted, LowRank, NewRows, Replaced, training_dtype
from veneer.updates.merge_checks import Written, refuse_not_finite_copy, refuse_not_finite_sum, refuse_trained
from veneer.updates.offloaded import hooked_as, refuse_offloaded, refuse_other_forward
from veneer.updates.record import adapters_of, put, refuse_merged
from veneer.updates.stand_ins import stand_back, stand_in
from veneer.updates.ties import part_where_broken, tied_parameters


def merge(model: nn.Module, *, reversible: bool = True) -> None:
    """Fold the active adapters into the weights; every adapted module becomes a plain one of its base's class.

    Every quantised linear layer, adapted or not, becomes an ``nn.Linear``, and experts become parameters, in the
    model's floating-point type, so that what ``save_pretrained`` writes is a model that transformers reads. Where
    modules hold one weight (an embedding and its head, an encoder's embedding and a decoder's) and an update holds for
    some of them only, all are untied and the model's config says so, so that ``save_pretrained`` writes each.
    ``reversible=False`` drops the adapters and the original weights; otherwise they stay in memory for `unmerge`.

    Raises TargetError when no adapter is active or the adapters are merged already, AdapterFileError when a merged
    weight would not be finite; the model is then unchanged.

    Example:
        >>> veneer.load_adapter(model, "adapter")
        >>> veneer.merge(model, reversible=False)
        >>> model.save_pretrained("merged")
    """
    refuse_no_model("merge", model)
    model = inner_model(model)
    record = adapters_of(model)
    refuse_merged(record, "merge again")
    if not record.active:
        raise TargetError("No adapter is active, so there is nothing to merge; attach or activate one first.")
    replaced = outermost(model)
    refuse_offloaded(model, [module for _, module in replaced], "be merged")
    refuse_other_forward(model, [module for _, module in replaced])
    for path, wrapper in replaced:
        refuse_groups(path, wrapper)
        _refuse_not_finite(path, wrapper)
    tied = tied_parameters(model)
    merged: dict[str, nn.Module] = {}
    shared: dict[int, nn.Parameter] = {}
    for path, wrapper in replaced:
        put(model, path, _merged(wrapper, shared))
        if reversible:
            merged[path] = wrapper
    call_every_layer(model)
    parted, was_tied = part_where_broken(model, tied)
    if reversible:
        record.merged, record.was_tied = {**parted, **merged}, was_tied
        new = {path: model.get_submodule(path) for path in record.merged}
        record.written = {path: Written(module) for path, module in new.items() if _is_new(module, record.merged[path])}
        stand_back(model)
    else:
        forget_adapters(model)


def merged_module(path: str, wrapper: nn.Module, shared: dict[int, nn.Parameter]) -> nn.Module:
    """The plain module that a merge puts in the place of one of the `outermost`. ``shared`` is one for all of a model.

    Raises AdapterFileError where a merged weight would not be finite.
    """
    assert isinstance(wrapper, Adapted | QuantisedLinear | Experts)
    refuse_groups(path, wrapper)
    _refuse_not_finite(path, wrapper)
    return _merged(wrapper, shared)


def plain_module(module: nn.Module) -> nn.Module:
    """The module that a merge puts in the place of one of a model's, without values: its parameters are on no device,
    to be given with each call."""
    while isinstance(module, Adapted):
        module = module.base
    if isinstance(module, QuantisedLinear):
        return _unfilled(module)
    plain = copy.copy(module)
    plain._parameters = {
        name: None if its is None else nn.Parameter(torch.empty_like(its, device=META), requires_grad=False)
        for name, its in module._parameters.items()
    }
    return plain


def _is_new(module: nn.Module, wrapper: nn.Module) -> bool:
    """Whether a merged module is the merge's own, not the wrapper's base or an adapter's copy."""
    return all(module is not inner for inner in wrapper.modules())


def unmerge(model: nn.Module, *, drop_changes: bool = False) -> None:
    """Take the merged adapters out again: the base weights are the original bytes, the adapters are as they were.

    Raises TargetError when nothing is merged, or the merged weights were moved, converted or trained since;
    ``drop_changes``: training after the merge is not refused but lost.

    Example:
        >>> veneer.load_adapter(model, "adapter")
        >>> before = model.model.layers[0].mlp.up_proj.weight.clone()
        >>> veneer.merge(model)
        >>> veneer.unmerge(model)
        >>> torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
        True
    """
    refuse_no_model("unmerge", model)
    model = inner_model(model)
    record = adapters_of(model)
    if not record.merged:
        raise TargetError("Nothing is merged into this model (or it was merged with reversible=False).")
    if not drop_changes:
        refuse_trained(model, record.written)
    for path, wrapper in record.merged.items():
        now, then = _type_and_place(model.get_submodule(path)), _type_and_place(wrapper)
        if now != then:
            raise TargetError(
                f"{path} was merged as {then} and is {now} now; put the model back with model.to(…) before unmerge."
            )
    for path, wrapper in record.merged.items():
        wrapper.train(model.get_submodule(path).training)
        put(model, path, wrapper)
    call_every_layer(model)
    if record.was_tied:
        say_tied(model.config, True)
    record.merged, record.was_tied, record.written = {}, None, {}
    stand_in(model)


def _type_and_place(module: nn.Module) -> str:
    """Type and device of a module's weight: the wrapper's, or that of the plain module in its place."""
    weight = stack_of(module, projections(module)[0]).weight if is_experts(module) else getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = next(module.parameters())
    return f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"


def outermost(model: nn.Module) -> list[tuple[str, Adapted | QuantisedLinear | Experts]]:
    """What a merge replaces, by name: the wrappers, quantised layers without one, and experts that have either."""
    inside = {id(module.base) for module in model.modules() if isinstance(module, Adapted)}
    mixed = {
        id(module): [module._modules[name] for name in projections(module) if name in module._modules]
        for module in model.modules()
        if isinstance(module, Experts)
    }
    inside |= {id(part) for parts in mixed.values() for part in parts}
    return [
        (path, module)
        for path, module in model.named_modules()
        if (isinstance(module, Adapted | QuantisedLinear) or mixed.get(id(module))) and id(module) not in inside
    ]


def _refuse_not_finite(path: str, wrapper: Adapted | QuantisedLinear | Experts) -> None:
    """Raises AdapterFileError where `_merged` would have a value that is not finite."""
    if isinstance(wrapper, Experts):
        if any(isinstance(module, Adapted) for module in wrapper.modules()):
            refuse_not_finite_copy(path, merged_experts(wrapper), None)
        return
    updates = wrapper.in_force() if isinstance(wrapper, Adapted) else []
    low_rank = [update for update in updates if isinstance(update, LowRank)]
    if low_rank:
        assert isinstance(wrapper, Adapted)
        base = wrapper.base
        weight = base.weight if isinstance(base, (nn.Embedding, *CONVOLUTIONS)) else frozen_weight(base).dense()
        refuse_not_finite_sum(path, weight, low_rank, lambda: _sum(base, low_rank))
    elif updates:
        refuse_not_finite_copy(path, updates[0], None if isinstance(wrapper, Replaced) else wrapper.weight.dtype)


def _merged(wrapper: Adapted | QuantisedLinear | Experts, shared: dict[int, nn.Parameter]) -> nn.Module:
    """The plain module that computes what the wrapper computes. ``shared`` keeps tied new rows tied."""
    if isinstance(wrapper, Experts):
        return merged_experts(wrapper)
    if isinstance(wrapper, QuantisedLinear):
        return _with_weight(wrapper, nn.Parameter(_sum(wrapper, []), requires_grad=False))
    if isinstance(wrapper, Replaced):
        return wrapper.copy().requires_grad_(False)
    base, updates = wrapper.base, wrapper.in_force()
    if not updates:
        return _merged(base, shared) if isinstance(base, QuantisedLinear) else base
    low_rank = [update for update in updates if isinstance(update, LowRank)]
    if low_rank:
        return _with_weight(base, nn.Parameter(_sum(base, low_rank), requires_grad=False))
    (rows,) = [update for update in updates if isinstance(update, NewRows)]
    if id(rows) not in shared:
        shared[id(rows)] = nn.Parameter(rows.merged(wrapper.weight), requires_grad=False)
    return _with_weight(base, shared[id(rows)])


def _sum(base: nn.Module, updates: list[LowRank]) -> Tensor:
    """W0 + Σ ΔW in the layout and type of the base's own weight."""
    if isinstance(base, nn.Embedding):
        weight, transposed = base.weight.detach().t(), True
    elif isinstance(base, CONVOLUTIONS):
        weight, transposed = base.weight.detach().flatten(1), False
    else:
        transposed = isinstance(base, Conv1D) or (isinstance(base, QuantisedLinear) and base.transposed)
        weight = frozen_weight(base).dense()
    own = weight.to(training_dtype(weight))
    exact = own.clone()
    for update in updates:
        exact += update.delta(own.dtype, own)
    exact = exact.to(weight.dtype)
    if isinstance(base, CONVOLUTIONS):
        return exact.view_as(base.weight)
    return exact.t().contiguous() if transposed else exact


def _with_weight(base: nn.Module, weight: nn.Parameter) -> nn.Module:
    """A module like ``base`` with another weight (out, in), or as (in, out) for a Conv1D; a quantised one becomes the
    class that it was quantised from."""
    if isinstance(base, QuantisedLinear):
        plain = _unfilled(base)
        if weight.dtype is not torch.float32:  # what it is given may be in fp32 all the same
            plain.__class__ = STORED[type(plain)]
        plain.weight, plain.bias = weight, base.bias
        return plain.train(base.training)
    module = copy.copy(base)
    # A shallow copy shares the dictionary that holds its parameters; the copy needs its own.
    module._parameters = dict(base._parameters)
    module.weight = marked_as(base._parameters.get("weight"), weight)
    return hooked_as(base, module)


def _unfilled(base: QuantisedLinear) -> nn.Linear | Conv1D:
    """The layer that a quantised one was quantised from, on no device."""
    sizes = base.out_features, base.in_features
    with torch.device(META):
        return Conv1D(*sizes) if base.transposed else nn.Linear(*sizes[::-1], bias=base.bias is not None)
