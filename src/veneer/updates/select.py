"""Which modules an update goes on: names and patterns in, modules out, and nothing that matches nothing in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from veneer.errors import TargetError, nearest, shown
from veneer.frozen.experts import QuantisedStack, Stack
from veneer.frozen.foreign import how_to_move, of_bitsandbytes
from veneer.frozen.new_parts import new_parts
from veneer.frozen.read_outside import read_outside
from veneer.frozen.text_part import beside_text, end_of
from veneer.frozen.weight import PLAIN_TYPES, QuantisedLinear, is_plain_linear
from veneer.updates.config import AdaLoRA, LoRA, UpdateOptions
from veneer.updates.convolutions import CONVOLUTIONS, refuse_convolution, refuse_rank
from veneer.updates.experts import expert_stacks, refuse_for_experts
from veneer.updates.layers import Adapted, weight_shape
from veneer.updates.patterns import whole_name

_Number = TypeVar("_Number", int, float)

LINEAR_TYPES = (*PLAIN_TYPES, QuantisedLinear)

# Names that different architectures give to the layers of one role, for the hint when a name matches nothing.
_ROLES = (
    "q_proj k_proj v_proj query key value q k v q_lin k_lin v_lin c_attn qkv_proj query_key_value Wqkv in_proj",
    "o_proj out_proj out_lin o dense c_proj wo Wo",
    "gate_proj up_proj gate_up_proj c_fc fc1 fc_in lin1 dense_h_to_4h wi wi_0 wi_1 w1 w3",
    "down_proj c_proj fc2 fc_out lin2 dense_4h_to_h wo w2",
    "embed_tokens wte embed_in word_embeddings shared",
    "classifier score classification_head",
)


@dataclass(frozen=True)
class Chosen:
    """A module that gets an update, with the rank and scale that LoRA's patterns give it; AdaLoRA's have 0 here."""

    name: str
    module: nn.Module
    rank: int = 0
    scale: float = 0.0


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by name, as they were before any adapter: wrappers and updates are looked through.

    The parameters of a mixture's experts are among them, each as a `Stack`.
    """
    return dict(_walk(model, "", set()))


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, Adapted):
        module = module.base
    if id(module) in seen:  # one module under two names goes by the first, as in named_modules
        return
    seen.add(id(module))
    yield name, module
    yield from expert_stacks(name, module)
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def choose(model: nn.Module, config: LoRA | AdaLoRA) -> list[Chosen]:
    """The modules that ``config`` adapts, in the model's order.

    Raises TargetError when a target, an exclusion, a layer or a pattern key matches nothing, each one also when
    others match, and when a target names a module that cannot be adapted.
    """
    modules = modules_of(model)
    beside = tuple(f"{name}." for name in beside_text(model))
    heads = head_names(model, modules)
    excluded = _matching(config.exclude, modules, "exclude")
    whole = {name for names in config.train_also for name in matching_suffix(names, modules)}
    outside = read_outside(model)
    if config.targets == "all-linear":
        names = [name for name, module in modules.items() if isinstance(module, LINEAR_TYPES) and name not in heads
                 and name not in outside and not f"{name}.".startswith(beside)
                 and (is_adaptable(module) or of_bitsandbytes(module))]  # fmt: skip
    else:
        names = _matching_modules(config.targets, modules)
    names = [name for name in _with_parameters(names, config, modules) if name not in excluded]
    inside_whole = {name for name in names if any(name == w or name.startswith(f"{w}.") for w in whole)}
    if config.targets != "all-linear" and inside_whole:
        raise TargetError(f"{_listed(inside_whole)} is in both targets and train_also; name it in one of them.")
    names = [name for name in names if name not in inside_whole]
    names = _in_layers(names, config, modules)
    for name in names:
        if not name:
            raise TargetError(
                f"The model is itself a {type(model).__name__}, and an update stands around a module of a model; put "
                f"it into one, such as nn.Sequential(layer)."
            )
        _refuse_unadaptable(name, modules[name])
        if isinstance(convolution := modules[name], CONVOLUTIONS):
            refuse_convolution(name, convolution, config)
        if name in outside and isinstance(modules[name], LINEAR_TYPES):
            raise TargetError(
                f"{name} is never called: the module around it reads its weight itself, so an update would do nothing; "
                f"leave it out of targets."
            )
        if isinstance(config, AdaLoRA) and isinstance(modules[name], nn.Embedding):
            raise TargetError(f"{name} is an Embedding, which AdaLoRA does not adapt; leave it out, or use LoRA.")
    refuse_for_experts([name for name in names if isinstance(modules[name], Stack)], config)
    if not names and config.chooses:
        raise TargetError(_nothing(config, modules))
    if isinstance(config, AdaLoRA):
        return [Chosen(name, modules[name]) for name in names]
    for option, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        _refuse_idle_keys(option, pattern, names)
    chosen = [Chosen(name, modules[name], *rank_and_scale(name, config)) for name in names]
    for one in chosen:
        if isinstance(one.module, CONVOLUTIONS):
            refuse_rank(one.name, one.module, one.rank)
    return chosen


def _matching_modules(targets: str | list[str], modules: dict[str, nn.Module]) -> list[str]:
    """What ``targets`` choose: modules, and where an entry matches none, parameters of experts, as PEFT's targets are
    of modules."""
    matching = _matching(targets, modules, "targets")
    stacks = [name for name in matching if isinstance(modules[name], Stack)]
    plain = [name for name in matching if not isinstance(modules[name], Stack)]
    if isinstance(targets, str):
        return plain or stacks
    of_experts = [target for target in targets if not matching_suffix(target, plain)]
    return plain + [name for name in stacks if any(matching_suffix(target, [name]) for target in of_experts)]


def _with_parameters(names: list[str], config: LoRA | AdaLoRA, modules: dict[str, nn.Module]) -> list[str]:
    """The names and those that target_parameters choose, in the model's order."""
    wanted = set(names)
    if isinstance(config, LoRA) and config.target_parameters:
        stacks: dict[str, nn.Module] = {name: module for name, module in modules.items() if isinstance(module, Stack)}
        for target in config.target_parameters:
            if not matching_suffix(target, stacks):
                raise TargetError(no_such_parameter(target, list(stacks)))
            wanted |= set(matching_suffix(target, stacks))
    return [name for name in modules if name in wanted]


def no_such_parameter(target: str, stacks: list[str]) -> str:
    endings = list(dict.fromkeys(".".join(name.rsplit(".", 2)[-2:]) for name in stacks))
    have = f"it has {', '.join(endings)}" if endings else "it has no experts of a known kind"
    return (
        f"target_parameters names {shown(target)}, which matches no parameter of experts of this model; {have}. Layers "
        f"are named in targets."
    )


def rank_and_scale(name: str, config: LoRA) -> tuple[int, float]:
    """The rank and the scale s that LoRA's patterns give the module of this name."""
    rank = _first_match(config.rank_pattern, name, config.rank)
    alpha = config.alpha if config.alpha is not None else 2.0 * config.rank
    return rank, config.scale(rank, _first_match(config.alpha_pattern, name, alpha))


def _first_match(pattern: dict[str, _Number], name: str, otherwise: _Number) -> _Number:
    # PEFT's reading of a key: a regex for the end of the name, at a dot. The first key that matches counts.
    return next((value for key, value in pattern.items() if key_matches(key, name)), otherwise)


def key_matches(key: str, name: str) -> bool:
    """Whether a pattern's ``key`` is for the module ``name``. Raises TargetError where it is no regular expression."""
    return whole_name(rf"(.*\.)?({key})$", name, f"The pattern key {shown(key)}")


def matching_suffix(target: str, names: Iterable[str]) -> list[str]:
    """The names that are ``target`` or end with it at a dot."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _matching(targets: str | list[str], modules: dict[str, nn.Module], option: str) -> list[str]:
    """Names chosen by a list of endings or by one regex, in the model's order; each entry must match something."""
    if isinstance(targets, str):
        said = f"{option} = {shown(targets)}"
        chosen = [name for name in modules if name and whole_name(targets, name, said)]
        if not chosen:
            raise TargetError(
                f"{option} = {shown(targets)}, a regular expression over whole module names, matches none of the "
                f"model's modules. {what_is_there(modules)}"
            )
        return chosen
    missing = [target for target in targets if not matching_suffix(target, modules)]
    if missing:
        raise TargetError(no_such_modules(missing, modules, option))
    wanted = {name for target in targets for name in matching_suffix(target, modules)}
    return [name for name in modules if name in wanted]


def no_such_modules(targets: list[str], modules: dict[str, nn.Module], option: str) -> str:
    """The sentences for names that match nothing: the nearest names of each, and what there is."""
    return " ".join([*(_no_such_module(target, modules, option) for target in targets), what_is_there(modules)])


def _no_such_module(target: str, modules: dict[str, nn.Module], option: str) -> str:
    if set(target) & set("*+?|()[]{}^$\\"):
        return (
            f"{option} lists {shown(target)}, which matches no module name: inside a list an entry is a name's ending, "
            f"not a regular expression. Give the expression alone, as one string: {option}={shown(target)}."
        )
    close = nearest_modules(target, modules)
    hint = f" Nearest here: {', '.join(close)}." if close else ""
    return f"{option} names {shown(target)}, which matches no module of this model.{hint}"


def nearest_modules(target: str, modules: dict[str, nn.Module]) -> list[str]:
    """Names of adaptable modules that play the part ``target`` plays elsewhere, then those spelt alike."""
    kinds = adaptable_kinds(modules)
    last = target.rsplit(".", 1)[-1]
    same_role = [name for role in _ROLES if last in role.split() for name in role.split() if name in kinds]
    return list(dict.fromkeys([*same_role, *nearest(last, kinds)]))


def what_is_there(modules: dict[str, nn.Module]) -> str:
    """One sentence that lists the adaptable modules by the last part of their names, with how many there are."""
    kinds = adaptable_kinds(modules)
    if not kinds:
        return "The model has no module that can be adapted."
    return "It has " + ", ".join(f"{kind} (×{count})" for kind, count in kinds.items()) + "."


def adaptable_kinds(modules: dict[str, nn.Module]) -> dict[str, int]:
    """The last part of the name of each module that can be adapted → how many there are."""
    kinds: dict[str, int] = {}
    for name, module in modules.items():
        if isinstance(module, (*LINEAR_TYPES, nn.Embedding, Stack, *CONVOLUTIONS)) and name:
            kind = name.rsplit(".", 1)[-1]
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def count_parameters(modules: dict[str, nn.Module]) -> int:
    """Parameters of these modules; a quantised weight counts by its shape, a tied one once."""
    sizes = {id(p): p.numel() for module in modules.values() for p in module.parameters(recurse=False)}
    quantised = (weight_shape(module) for module in modules.values() if isinstance(module, QuantisedLinear))
    stacks = (m.experts * m.shape[0] * m.shape[1] for m in modules.values() if isinstance(m, QuantisedStack))
    return sum(sizes.values()) + sum(rows * columns for rows, columns in quantised) + sum(stacks)


def head_names(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """Names of the output head: the language-modelling head, or all that belongs to a classification head, and to what
    else is in no checkpoint."""
    head = output_head(model)
    heads = {name for name, module in modules.items() if head is not None and module is head}
    classifier, (new, _) = classification_head(model), new_parts(model, modules)
    for part in [*new, *([classifier] if classifier else [])]:
        heads |= {name for name in modules if name == part or name.startswith(f"{part}.")}
    return heads


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of a vocabulary, or None."""
    return _end(model, "output")


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that looks up the vectors of tokens, or None: a model of images or sound has none."""
    return _end(model, "input")


def _end(model: nn.Module, end: str) -> nn.Module | None:
    module: nn.Module | None = end_of(model, end)
    return module.base if isinstance(module, Adapted) else module


def classification_head(model: nn.Module) -> str | None:
    """Name of a sequence-classification model's head, which starts random and must be trained; or None."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return None
    names = [name for name, _ in model.named_children()]
    return next((name for name in ("score", "classifier", "classification_head") if name in names), None)


def layer_number(name: str, lists: Sequence[str] = ()) -> int | None:
    """The block a module belongs to: the first number in its name; or the first after one of ``lists``, names of lists
    of modules that may have dots."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit() and (not lists or any(_ends(parts[:place], each.split(".")) for each in lists)):
            return int(part)
    return None


def _ends(parts: list[str], ending: list[str]) -> bool:
    return parts[-len(ending) :] == ending


def _in_layers(names: list[str], config: UpdateOptions, modules: dict[str, nn.Module]) -> list[str]:
    if not config.layers:
        return names
    lists = config.layers_pattern
    for each in lists:
        if not any(layer_number(name, [each]) is not None for name in modules):
            known = dict.fromkeys(before.rsplit(".", 1)[-1] for name in modules for before in _lists_in(name))
            raise TargetError(
                f"layers_pattern names {shown(each)}, which is no list of modules of this model; it has "
                f"{', '.join(known) or 'none'}."
            )
    there = {number for name in modules if (number := layer_number(name, lists)) is not None}
    absent = sorted(set(config.layers) - there)
    if absent:
        have = f"0 to {max(there)}" if there else "none that are numbered"
        raise TargetError(f"layers names {_listed(absent)}, but the model's layers are {have}.")
    return [name for name in names if layer_number(name, lists) in config.layers]


def _lists_in(name: str) -> list[str]:
    """What stands before each number in a name."""
    parts = name.split(".")
    return [".".join(parts[:place]) for place, part in enumerate(parts) if part.isdigit() and place]


def _refuse_unadaptable(name: str, module: nn.Module) -> None:
    # A subclass may compute something else than x W0ᵀ + b (a packed weight, an offset), or be read around its
    # forward (attention's own out_proj): only the types whose product is known are adapted.
    if isinstance(module, Stack) or type(module) in CONVOLUTIONS:
        return
    known_embedding = type(module) is nn.Embedding or hasattr(module, "embed_scale")
    if is_adaptable(module) or (isinstance(module, nn.Embedding) and known_embedding):
        if getattr(module, "max_norm", None) is not None:
            raise TargetError(f"{name} is an Embedding with max_norm, which changes its weight as it looks it up.")
        return
    if of_bitsandbytes(module):
        raise TargetError(f"{name} is a {type(module).__name__} of bitsandbytes{how_to_move(module)}")
    inside = [child for child, part in modules_of(module).items() if child and isinstance(part, (*LINEAR_TYPES, Stack))]
    remedy = f" It holds {', '.join(inside[:8])}: name those." if inside else " Leave it out with exclude."
    raise TargetError(
        f"{name} is a {type(module).__name__}, which cannot be adapted; Linear, Conv1D, Embedding and convolution "
        f"layers can."
        f"{remedy}"
    )


def is_adaptable(module: nn.Module) -> bool:
    """Whether a linear layer is of a type whose product is known."""
    return isinstance(module, QuantisedLinear) or is_plain_linear(module)


def _refuse_idle_keys(option: str, pattern: dict[str, int] | dict[str, float], names: list[str]) -> None:
    for key in pattern:
        if not any(key_matches(key, name) for name in names):
            kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            close = nearest(key, [*kinds, *names])
            hint = f" Nearest: {', '.join(close)}." if close else ""
            raise TargetError(
                f"{option} has the key {shown(key)}, which matches none of the adapted modules.{hint} Adapted are: "
                f"{', '.join(kinds)}."
            )


def _nothing(config: UpdateOptions, modules: dict[str, nn.Module]) -> str:
    narrowed = [option for option in ("exclude", "layers") if getattr(config, option)]
    because = f" once {' and '.join(narrowed)} had been applied" if narrowed else ""
    parameters = getattr(config, "target_parameters", [])
    asked = f"targets = {shown(config.targets)}" + (
        f" and target_parameters = {shown(parameters)}" if parameters else ""
    )
    return f"{asked} chose no module{because}. {what_is_there(modules)}"


def _listed(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in sorted(names, key=str))
