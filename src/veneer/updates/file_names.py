"""What the names in a PEFT folder mean on one model: where its config leaves that open, its tensors decide.

PEFT reads endings of names, adds names of its own by task, and writes weights that no option names: a resized
vocabulary, a tied head. What a person asks for goes through `choose`, which refuses what matches nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.errors import TargetError
from veneer.frozen.experts import Stack, is_experts
from veneer.updates.adapter_file import MAGNITUDES, PREFIX, ROWS
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.select import choose, key_matches, matching_suffix, modules_of, no_such_parameter, rank_and_scale
from veneer.updates.ties import row_groups

_UPDATE = re.compile(r"\.lora_((embedding_)?[ABE](\.weight)?|magnitude_vector)$")
_NAMED = re.compile(r"\.(lora_(?:embedding_)?[ABE]|trainable_tokens_delta)\.(?!weight$)[^.]+(\.weight)?$")
_MAGNITUDES = re.compile(r"(\.lora_magnitude_vector)(\.[^.]+)?(\.weight)?$")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")


@dataclass(frozen=True)
class Placed:
    """A file on one model: the config with whole names, the tensors that are the adapter's, and the modules that hold
    new rows (None: it has none)."""

    config: LoRA | AdaLoRA
    tensors: dict[str, Tensor]
    rows_on: list[str] | None


def placed_on(model: nn.Module, config: LoRA | AdaLoRA, tensors: dict[str, Tensor]) -> Placed:
    """Raises TargetError where ``config`` does not fit the model."""
    modules = modules_of(model)
    tensors = {_without_adapter_name(key): tensor for key, tensor in tensors.items()}
    tensors, folded = _folded(config, tensors, modules)
    whole, copies = _whole(config, tensors, modules, folded)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in copies}
    names = _adapted_names(model, config, tensors, modules, whole)
    stacks = [name for name in names if isinstance(modules[name], Stack)]
    rows = [key.removeprefix(PREFIX).removesuffix(ROWS) for key in tensors if key.endswith(ROWS)]
    update: dict[str, object] = {
        "targets": _exactly([name for name in names if name not in stacks], modules), "exclude": [], "layers": [],
        "layers_pattern": [],
        "train_also": whole, **({"target_parameters": stacks} if isinstance(config, LoRA) else {}),
        **_patterns_of(config, names),
    }  # fmt: skip
    return Placed(config.model_copy(update=update), tensors, rows or None)


def other_vocabulary(model: nn.Module, tensors: dict[str, Tensor]) -> str | None:
    """A clause about a file whose embedding or head has another number of tokens than the model's, or None."""
    for group in row_groups(model):
        for path, module in group.items():
            rows = _rows_in(path, tensors)
            there = module.weight.shape[0] if isinstance(module.weight, Tensor) else rows
            if rows is not None and rows != there:
                return (
                    f"its vocabulary has {rows} tokens and this model's {there}: call "
                    f"model.resize_token_embeddings({rows}) first"
                )
    return None


def _rows_in(path: str, tensors: dict[str, Tensor]) -> int | None:
    sizes = {"weight": 0, "base_layer.weight": 0, "lora_B.weight": 0, "lora_embedding_A": 1}
    keys = {f"{PREFIX}{path}.{part}": dim for part, dim in sizes.items()}
    return next(
        (tensors[key].shape[dim] for key, dim in keys.items() if key in tensors and tensors[key].dim() > dim), None
    )


def _without_adapter_name(key: str) -> str:
    """``key`` less the adapter's name, which some tools leave in it: lora_A.default.weight."""
    return _SAVED.sub("", _MAGNITUDES.sub(r"\1", _NAMED.sub(r".\1\2", key)))


def _folded(
    config: LoRA | AdaLoRA, tensors: dict[str, Tensor], modules: dict[str, nn.Module]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, where a module comes with an update and with a base weight that is not the model's own: then its
    whole weight in place of both. And the names of these modules."""
    kept, folded = dict(tensors), []
    for key, weight in tensors.items():
        if not key.endswith(".base_layer.weight"):
            continue
        path = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
        own = getattr(modules.get(path), "weight", None)
        if not isinstance(own, Tensor) or own.shape != weight.shape:
            continue
        del kept[key]
        if torch.equal(own.to(weight), weight) or not isinstance(config, LoRA):
            continue
        whole = _with_update(path, modules[path], config, tensors, weight)
        if whole is not None:
            kept = {k: t for k, t in kept.items() if _UPDATE.sub("", k) != f"{PREFIX}{path}"}
            kept[f"{PREFIX}{path}.weight"] = whole
            folded.append(path)
            for name, bias in modules[path].named_parameters(recurse=False):
                if name != "weight":
                    kept[f"{PREFIX}{path}.{name}"] = tensors.get(f"{PREFIX}{path}.base_layer.{name}", bias.detach())
                    kept.pop(f"{PREFIX}{path}.base_layer.{name}", None)
    return kept, folded


def _with_update(
    path: str, module: nn.Module, config: LoRA, tensors: dict[str, Tensor], weight: Tensor
) -> Tensor | None:
    """``weight`` of a file, in the layout of the module's own, with the file's update in it; None where that does not
    fit."""
    embedding = isinstance(module, nn.Embedding)
    keys = [f"{PREFIX}{path}.lora_{'embedding_' if embedding else ''}{part}{'' if embedding else '.weight'}"
            for part in "AB"]  # fmt: skip
    if any(key not in tensors for key in keys):
        return None
    A, B = (tensors[key].float() for key in keys)
    if not A.dim() == B.dim() == 2 or A.shape[0] != B.shape[1]:
        return None
    delta = rank_and_scale(path, config)[1] * (B @ A)
    transposed = embedding or isinstance(module, Conv1D)
    if (delta.t() if transposed else delta).shape != weight.shape:
        return None
    whole = (weight.t() if transposed else weight).float() + delta
    if config.dora:
        magnitudes = tensors.get(f"{PREFIX}{path}{MAGNITUDES}")
        if magnitudes is None or magnitudes.shape != whole.shape[:1]:
            return None
        whole *= (magnitudes.float() / whole.norm(dim=1))[:, None]
    return (whole.t() if transposed else whole).to(weight.dtype).contiguous()


def _whole(
    config: LoRA | AdaLoRA, tensors: dict[str, Tensor], modules: dict[str, nn.Module], folded: list[str]
) -> tuple[list[str], set[str]]:
    """The modules that the file has whole, and the keys of weights that are the model's own."""
    plain = {key for key in tensors if not _UPDATE.search(key) and not key.endswith(ROWS)}
    updated = {_UPDATE.sub("", key).removeprefix(PREFIX) for key in tensors if _UPDATE.search(key)}
    # PEFT's reading of modules_to_save: the plain ending of a name, at a dot or not. Where the file has updates of such
    # a module, or in it, and none of its weights, the name meant another one.
    named = [name for name in modules if name and name.endswith(tuple(config.train_also))]
    whole = [name for name in named if _inside(name, plain) or not any(_within(u, name) for u in updated)]
    copies: set[str] = set()
    for key in sorted(plain):
        owner, _, name = key.removeprefix(PREFIX).rpartition(".")
        if owner not in modules or any(_within(owner, outer) for outer in whole):
            continue
        own = modules[owner].state_dict()
        same = name in own and own[name].shape == tensors[key].shape
        if owner not in folded and same and torch.equal(own[name].to(tensors[key]), tensors[key]):
            copies.add(key)
            continue
        if all(f"{PREFIX}{owner}.{part}" in plain and own[part].shape == tensors[f"{PREFIX}{owner}.{part}"].shape
               for part in own):  # fmt: skip
            whole.append(owner)
    outermost = [name for name in whole if not any(name != other and _within(name, other) for other in whole)]
    inside = tuple(f"{PREFIX}{name}." for name in outermost)
    return [name for name in modules if name in outermost], {key for key in copies if not key.startswith(inside)}


def _inside(name: str, keys: set[str]) -> bool:
    return any(key.startswith(f"{PREFIX}{name}.") for key in keys)


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _adapted_names(
    model: nn.Module, config: LoRA | AdaLoRA, tensors: dict[str, Tensor], modules: dict[str, nn.Module],
    whole: list[str],
) -> list[str]:  # fmt: skip
    """The modules that the file has updates of, and those that its config names; none inside of a whole one."""
    names = {_UPDATE.sub("", key).removeprefix(PREFIX) for key in tensors if _UPDATE.search(key)}
    # PEFT calls updates of experts after the module that holds them; its config says of which parameters they are.
    names -= {name for name in names if name in modules and is_experts(modules[name])}
    experts = _expert_names(model, config, modules)
    names |= experts
    if config.targets and config.targets != "all-linear":
        known = _known(config.targets, modules) or ([] if experts else config.targets)  # or let `choose` say so
        plain: dict[str, object] = {
            "targets": known, "exclude": _known(config.exclude, modules), "train_also": [],
        }  # fmt: skip
        if isinstance(config, LoRA):
            plain |= {"rank_pattern": {}, "alpha_pattern": {}, "target_parameters": []}
        if known:
            names |= {chosen.name for chosen in choose(model, config.model_copy(update=plain))}
    return [name for name in modules if name in names and not any(_within(name, outer) for outer in whole)]


def _expert_names(model: nn.Module, config: LoRA | AdaLoRA, modules: dict[str, nn.Module]) -> set[str]:
    """The parameters of experts that ``target_parameters`` choose. Raises TargetError where one chooses others."""
    stacks = [name for name, module in modules.items() if isinstance(module, Stack)]
    found: set[str] = set()
    for target in config.target_parameters if isinstance(config, LoRA) else ():
        matching = matching_suffix(target, stacks)
        if not matching and matching_suffix(target, (name for name, _ in model.named_parameters())):
            raise TargetError(no_such_parameter(target, stacks))
        found |= set(matching)
    if isinstance(config, LoRA) and config.target_parameters and not found:
        raise TargetError(no_such_parameter(config.target_parameters[0], stacks))
    return found


def _known(names: str | list[str], modules: dict[str, nn.Module]) -> str | list[str]:
    """Names that match something: other tools write those of several architectures into one file."""
    return names if isinstance(names, str) else [name for name in names if matching_suffix(name, modules)]


def _exactly(names: list[str], modules: dict[str, nn.Module]) -> str | list[str]:
    """Targets that choose these modules and no others."""
    if all(matching_suffix(name, modules) == [name] for name in names):
        return names
    return "|".join(re.escape(name) for name in names)


def _patterns_of(config: LoRA | AdaLoRA, names: list[str]) -> dict[str, object]:
    if isinstance(config, AdaLoRA):
        return {}
    return {
        option: {key: value for key, value in pattern.items() if any(key_matches(key, name) for name in names)}
        for option, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
    }
