"""Put updates on a model, choose which are in force, and take them off again.

attach(model, LoRA(rank=8))           every base weight frozen, the updates trainable
activate(model, "b")                  another adapter in force
with disabled(model): ...             the base's own answers
remove(model, "b")                    gone; with the last one, the base is what it was
"""

from __future__ import annotations

from typing import TypeVar, cast

from torch import Tensor, nn

from veneer.arguments import described, refuse_no_model, refuse_no_name
from veneer.errors import ArgumentError, TargetError
from veneer.frozen.exact import whole_copy
from veneer.frozen.experts import QuantisedStack, Stack
from veneer.frozen.weight import QuantisedLinear
from veneer.updates.allocator import Allocator
from veneer.updates.beside import with_new_parts
from veneer.updates.budget import resolved
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.convolutions import CONVOLUTIONS, AdaptedConv, ConvPair, new_conv_pair
from veneer.updates.experts import AdaptedStack, ExpertPairs, give_back_stacks, hold_stack, new_pairs
from veneer.updates.fast_path import call_every_layer
from veneer.updates.inner import inner_model
from veneer.updates.layers import (
    Adapted,
    AdaptedEmbedding,
    AdaptedLinear,
    Dora,
    LowRank,
    NewRows,
    Pair,
    Replaced,
    Triplets,
    new_factors,
    new_triplets,
    weight_shape,
)
from veneer.updates.left_out import left_out
from veneer.updates.loftq import Start, loftq_starts
from veneer.updates.offloaded import refuse_offloaded
from veneer.updates.peft_config import peft_call
from veneer.updates.pissa import new_pissa, pissa_starts
from veneer.updates.reached import Reached, warn
from veneer.updates.record import (
    RECORD,
    Adapters,
    Holders,
    activate,
    adapted,
    adapters_of,
    allocator,
    holders_of,
    put,
    refuse_merged,
    refuse_unknown,
    updates_of,
)
from veneer.updates.select import (
    Chosen,
    choose,
    count_parameters,
    matching_suffix,
    modules_of,
    no_such_modules,
)
from veneer.updates.stand_ins import stand_back, stand_in
from veneer.updates.state import hooked
from veneer.updates.ties import never_called, row_groups
from veneer.updates.wrappers import refuse_occupied

M = TypeVar("M", bound=nn.Module)


def attach(model: M, config: LoRA | AdaLoRA, name: str = "default") -> M:
    """Freeze every weight of ``model`` and put the updates that ``config`` describes on the modules it chooses.

    Returns ``model`` itself; the adapters of one that is compiled, or a DataParallel, are on the model inside. The new
    adapter is the active one. The model's output does not change until the updates are trained, unless they start from
    what quantising lost (``init="loftq"``, or "pissa" over codes): then it is nearer to the unquantised model's. What
    is in no checkpoint is trained whole and saved with the adapter, unless ``config`` targets it: a classifier's head,
    a new pooler, the rows of a vocabulary that was made larger. Where it is not known from which checkpoint the model
    was read, these are the modules beside the backbone of a task's class.

    A `VeneerWarning` names what is trained whole, and linear layers that "all-linear" cannot take and leaves out.

    An `AdaLoRA` adapter then finds its ranks by itself, in the steps of whichever torch optimizer holds its parameters.

    Raises TargetError, with the model unchanged, when a name matches nothing, a module cannot be adapted, or an
    adapter of this name, or one of peft's, is attached already; ModelError when loftq needs weights that are not
    available; ConfigError for an AdaLoRA without total_steps or with an impossible budget; ArgumentError for arguments
    of another type.

    Example:
        >>> model = veneer.attach(model, veneer.LoRA(rank=4, targets=["q_proj", "v_proj"]))
        >>> veneer.trainable(model).parameters
        896
    """
    refuse_no_model("attach", model)
    if not isinstance(config, LoRA | AdaLoRA):
        raise ArgumentError(_no_config(config))
    refuse_no_name("attach", name)
    for note in attach_noted(model, config, name):
        warn(note)
    return model


def attach_noted(model: nn.Module, config: LoRA | AdaLoRA, name: str = "default") -> list[str]:
    """`attach`, of which what there is to say is returned as sentences, not given as warnings."""
    inner = inner_model(model)
    refuse_occupied(inner, model)
    config, new = with_new_parts(inner, config)
    left = left_out(inner, config)
    add_adapter(inner, config, name)
    if isinstance(config, AdaLoRA):
        allocator(inner, name).prepare()
    return [note for note in (new, left) if note]


def _no_config(config: object) -> str:
    """The refusal of what is neither LoRA nor AdaLoRA, with the call that was probably meant."""
    text = f"attach takes a veneer.LoRA or veneer.AdaLoRA as config, not {described(config)}."
    if isinstance(config, type) and issubclass(config, LoRA | AdaLoRA):
        return f"{text} Write {config.__name__}(…)."
    if isinstance(config, dict):
        return f"{text} Write veneer.LoRA(**options)."
    if type(config).__module__.startswith("peft."):
        return f"{text} Its options are here: {peft_call(config)}."
    return text


def add_adapter(model: nn.Module, config: LoRA | AdaLoRA, name: str, rows_on: list[str] | None = None) -> None:
    """`attach` of exactly what ``config`` names. ``rows_on``: modules that hold its new tokens' rows, where not all."""
    record = adapters_of(model)
    refuse_merged(record, "attach another adapter")
    _refuse_other_name(record, name)
    chosen = choose(model, config) if config.chooses else []
    whole = trained_whole(model, config)
    row_modules = rows_for(model, config, {c.name for c in chosen} | set(whole), rows_on)
    if isinstance(config, AdaLoRA):
        config = resolved(config, [weight_shape(c.module) for c in chosen], count_parameters(modules_of(model)))
    updated = {c.name for c in chosen}.union(*row_modules)
    _refuse_conflicts(model, updated, set(whole))
    _refuse_never_called(model, updated.difference(*row_modules) | set(whole))
    begins = isinstance(config, LoRA) and config.init in ("loftq", "pissa")
    read = [c.module for c in chosen] if begins or (isinstance(config, LoRA) and config.dora) else []
    refuse_offloaded(
        model, [*read, *whole.values(), *(m for group in row_modules for m in group.values())], "be read by attach"
    )
    starts = _starts(model, config, chosen) if isinstance(config, LoRA) and begins else {}
    changed = isinstance(config, LoRA) and any(start.quantised is not None for start in starts.values())
    if changed and record.configs:
        raise TargetError(
            f"{_beginning(config)} changes the base under {', '.join(record.configs)}; remove what is attached first, "
            f"or use init = 'kaiming'."
        )
    made = {c.name: _low_rank(c, config, starts.get(c.name)) for c in chosen}  # may ask for more than there is
    if not record.configs:
        record = _first_record(model, _beginning(config) if changed else "")

    for module_chosen in chosen:
        if isinstance(module_chosen.module, Stack):
            hold_stack(model, module_chosen.name)
    holders = holders_of(model)
    for path, update in made.items():
        _add(model, path, name, update, holders)
    if isinstance(config, AdaLoRA):
        triplets = {path: u for path, u in updates_of(model, name).items() if isinstance(u, Triplets)}
        record.allocators[name] = Allocator(config, triplets)
    for path, module in whole.items():
        _add(model, path, name, whole_copy(module).requires_grad_(True), holders)
    for group in row_modules:
        rows = NewRows(config.new_tokens, cast(Tensor, next(iter(group.values())).weight))
        for path in group:
            _add(model, path, name, rows, holders)
    record.configs[name] = config
    call_every_layer(model)
    updates = updates_of(model, name)
    own = {id(parameter) for update in updates.values() for parameter in update.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in own]
    record.reached[name] = Reached(name, updates, others)
    activate(model, name)


def _refuse_other_name(record: Adapters, name: str) -> None:
    """Raises TargetError for a name that is taken, or that torch's containers cannot hold."""
    if name in record.configs:
        raise TargetError(
            f"An adapter named {name!r} is attached already; give this one another name, or remove({name!r}) first."
        )
    if not name.replace("-", "_").isidentifier() or hasattr(nn.ModuleDict, name):
        raise TargetError(
            f"{name!r} cannot name an adapter; use letters, digits, _ and -, and no name that PyTorch uses (train, "
            f"keys)."
        )


def _starts(model: nn.Module, config: LoRA, chosen: list[Chosen]) -> dict[str, Start]:
    """Where the updates of layers in codes start, by name."""
    if config.init == "pissa":
        return pissa_starts(model, chosen)
    return loftq_starts(model, chosen, config.loftq_iterations)


def _beginning(config: LoRA | AdaLoRA) -> str:
    """The option with which an adapter changes the base as it begins."""
    iterations = config.loftq_iterations if isinstance(config, LoRA) else 1
    return f"loftq_iterations = {iterations}" if iterations > 1 else "init = 'pissa'"


def _first_record(model: nn.Module, changed_base: str) -> Adapters:
    """The record of a model's first adapter, kept on the model, every weight of which is frozen."""
    record = Adapters()
    record.was_trainable = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    record.changed_base = changed_base
    model.__dict__[RECORD] = record
    model.requires_grad_(False)
    record.hooks = hooked(model)
    stand_in(model)
    return record


def remove(model: nn.Module, name: str = "default") -> None:
    """Take an adapter off. With the last one, the base's own modules are back in their places, bit for bit.

    Raises TargetError when there is no such adapter, or LoftQ changed the base for it.

    Example:
        >>> model = veneer.attach(model, veneer.LoRA(), name="brief")
        >>> veneer.remove(model, "brief")
        >>> type(model.model.layers[0].mlp.up_proj).__name__
        'Linear'
    """
    refuse_no_model("remove", model)
    model = inner_model(model)
    refuse_no_name("remove", name)
    record = adapters_of(model)
    refuse_merged(record, "remove an adapter")
    refuse_unknown(record, name)
    if record.changed_base:
        raise TargetError(f"{record.changed_base} changed the base, so it cannot be given back; load the model again.")
    for path, module in adapted(model).items():
        if name in module.updates:
            del module.updates[name]
        if not module.updates:
            put(model, path, module.base)
    give_back_stacks(model)
    del record.configs[name]
    record.allocators.pop(name, None)
    record.reached.pop(name, None)
    record.chosen = tuple(other for other in record.chosen if other != name)
    if record.configs:
        activate(model, *record.chosen)
    else:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path in record.was_trainable)
        forget_adapters(model)
    call_every_layer(model)


def forget_adapters(model: nn.Module) -> None:
    """Nothing is attached to ``model`` any more."""
    for hook in model.__dict__.pop(RECORD).hooks:
        hook.remove()
    stand_back(model)


def _add(model: nn.Module, path: str, name: str, update: nn.Module, holders: Holders) -> None:
    there = model.get_submodule(path)
    if not isinstance(there, Adapted):
        there = _wrap(there, update)
        put(model, path, there, holders)
    update.train(there.training)
    there.updates[name] = update


def _refuse_conflicts(model: nn.Module, updated: set[str], whole: set[str]) -> None:
    """A module cannot be trained whole by one adapter and updated, itself or inside, by another."""
    for path, module in adapted(model).items():
        for new in sorted(updated if isinstance(module, Replaced) else whole):
            outer, inner = (path, new) if isinstance(module, Replaced) else (new, path)
            if outer == inner or inner.startswith(f"{outer}."):
                raise TargetError(
                    f"{outer} would be trained whole by one adapter and {inner} updated by another; remove one first."
                )


def _refuse_never_called(model: nn.Module, names: set[str]) -> None:
    for path, others in never_called(model).items():
        if path in names:
            raise TargetError(
                f"{path} is never called: it only lends its weight to {' and '.join(others)}, so an update of it would "
                f"do nothing; name {'those' if len(others) > 1 else 'that'} instead."
            )


def _wrap(base: nn.Module, update: nn.Module) -> Adapted:
    if not isinstance(update, LowRank | NewRows):
        return Replaced(base)
    if isinstance(update, ExpertPairs):
        return AdaptedStack(base)
    if isinstance(update, ConvPair):
        return AdaptedConv(base)
    return AdaptedEmbedding(base) if isinstance(base, nn.Embedding) else AdaptedLinear(base)


def _low_rank(chosen: Chosen, config: LoRA | AdaLoRA, start: Start | None) -> LowRank:
    if isinstance(config, AdaLoRA):
        assert config.initial_rank is not None
        alpha = config.alpha if config.alpha is not None else 2.0 * config.initial_rank
        made = new_triplets(chosen.module, config.initial_rank)
        return Triplets(*made, alpha / config.initial_rank, config.dropout)
    if isinstance(chosen.module, Stack):
        return new_pairs(chosen.module, chosen.rank, config.init, chosen.scale)
    if isinstance(chosen.module, CONVOLUTIONS):
        return new_conv_pair(chosen.module, chosen.rank, config.init, chosen.scale, config.dropout)
    if start is not None and start.quantised is not None and isinstance(chosen.module, QuantisedLinear):
        chosen.module.replace(start.quantised)
    if config.init == "pissa" and start is None:
        return new_pissa(chosen, config.dropout)
    A, B = (start.A, start.B) if start is not None else new_factors(chosen.module, chosen.rank, config.init)
    if config.dora:
        return Dora(A, B, chosen.scale, config.dropout, chosen.module)
    return Pair(A, B, chosen.scale, config.dropout)


def trained_whole(model: nn.Module, config: LoRA | AdaLoRA) -> dict[str, nn.Module]:
    """Name → module of those that ``train_also`` names. Raises TargetError."""
    modules = modules_of(model)
    missing = [target for target in config.train_also if not matching_suffix(target, modules)]
    if missing:
        raise TargetError(no_such_modules(missing, modules, "train_also"))
    whole = {path: modules[path] for target in config.train_also for path in matching_suffix(target, modules)}
    for path, module in whole.items():
        outer = next((other for other in whole if path.startswith(f"{other}.")), None)
        if outer is not None:
            raise TargetError(f"train_also names {path}, and {outer} that holds it; name one of them.")
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise TargetError(
                f"train_also names {path}, a list of modules that computes nothing itself; name modules in it, such "
                f"as {path}.{next(iter(module._modules), 0)}."
            )
        if isinstance(module, Stack):
            raise TargetError(
                f"train_also names {path}, which is a parameter of {path.rpartition('.')[0]}; name that module."
            )
        if any(isinstance(inner, QuantisedLinear | QuantisedStack) for inner in module.modules()):
            raise TargetError(f"train_also names {path}, which is kept in codes and cannot be trained whole.")
    return whole


def rows_for(
    model: nn.Module, config: LoRA | AdaLoRA, taken: set[str], on: list[str] | None
) -> list[dict[str, nn.Module]]:
    """The modules that ``config.new_tokens`` give new rows, those that share them together: the embedding's, and an
    untied head's unless it is trained otherwise (``taken``). ``on``: names of modules, one of each group that is meant;
    None means all."""
    if not config.new_tokens:
        return []
    groups = row_groups(model)
    if not groups:
        raise TargetError(f"new_tokens needs a model with an input embedding; {type(model).__name__} has none.")
    rows = cast(nn.Embedding, next(iter(groups[0].values()))).weight.shape[0]
    beyond = [token for token in config.new_tokens if not 0 <= token < rows]
    if beyond:
        raise TargetError(
            f"new_tokens names {beyond}, but the embedding has {rows} rows; call "
            f"model.resize_token_embeddings(len(tokenizer)) first."
        )
    if len(set(config.new_tokens)) < len(config.new_tokens):
        raise TargetError(f"new_tokens names a token twice: {config.new_tokens}.")
    if on is not None:
        return [group for group in groups if set(group) & set(on)]
    both = sorted(set(groups[0]) & taken)
    if both:
        raise TargetError(f"{', '.join(both)} is adapted or trained whole and holds new_tokens too; choose one.")
    return [group for group in groups if not set(group) & taken]
