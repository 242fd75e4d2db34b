"""Weights that several modules hold: an embedding and its head, an encoder's and a decoder's, a head's two biases."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from veneer.frozen.experts import Stack
from veneer.frozen.new_parts import marked_as
from veneer.frozen.text_part import say_tied
from veneer.updates.record import put
from veneer.updates.select import input_embedding, modules_of, output_head

Holder = tuple[str, str]  # a module's name, and the parameter's name in it


def sharing(model: nn.Module, holder: nn.Module) -> dict[str, nn.Module]:
    """The modules, by name, whose weight is that of ``holder``, itself among them."""
    weight = getattr(holder, "weight", None)
    return {path: m for path, m in modules_of(model).items() if m is holder or getattr(m, "weight", None) is weight}


def row_groups(model: nn.Module) -> list[dict[str, nn.Module]]:
    """The modules that hold rows of the vocabulary: those with the input embedding's weight, and, where its rows are
    others, those with the output head's. Empty without an input embedding."""
    embedding, head = input_embedding(model), output_head(model)
    if not isinstance(embedding, nn.Embedding):
        return []
    groups = [sharing(model, embedding)]
    weight = getattr(head, "weight", None)
    if head is None or weight is None or weight is embedding.weight or weight.dim() != 2:
        return groups
    return [*groups, sharing(model, head)] if weight.shape[0] == embedding.num_embeddings else groups


def never_called(model: nn.Module) -> dict[str, list[str]]:
    """The embedding that only lends its weight, as an encoder-decoder's ``shared`` does → those that are called.

    It has the input embedding's weight, as all the others have, and they are inside of parts beside it.
    """
    embedding = input_embedding(model)
    same = [path for path, m in sharing(model, embedding).items() if isinstance(m, nn.Embedding)] if embedding else []
    for own in same:
        outer = own.rpartition(".")[0]
        beside = f"{outer}." if outer else ""
        others = [path for path in same if path != own]
        if others and all(path.startswith(beside) and "." in path.removeprefix(beside) for path in others):
            return {own: others}
    return {}


def tied_parameters(model: nn.Module) -> list[list[Holder]]:
    """The holders of each parameter that more than one module holds."""
    holders: dict[int, list[Holder]] = {}
    for path, module in modules_of(model).items():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(module, Stack):  # which holds a parameter of its own experts
                holders.setdefault(id(parameter), []).append((path, name))
    return [its for its in holders.values() if len(its) > 1]


def part_where_broken(model: Any, tied: list[list[Holder]]) -> tuple[dict[str, nn.Module], bool]:
    """Give each holder a parameter of its own once those of one of the groups ``tied`` differ, for a config says of all
    of them at once whether they are one: save_pretrained then writes them all.

    Returns the modules that were replaced, by name, and whether the config says so now; one that always says "tied"
    (T5's) stays, and transformers ties what is equal as it loads.
    """
    if getattr(model, "config", None) is None or all(len(_distinct(model, holders)) == 1 for holders in tied):
        return {}, False
    replaced: dict[str, nn.Module] = {}
    for holders in tied:
        seen: set[int] = set()
        for path, name in holders:
            module = model.get_submodule(path)
            parameter = getattr(module, name)
            if id(parameter) in seen:
                replaced.setdefault(path, module)
                put(model, path, _with_own(module, name))
            seen.add(id(parameter))
    was_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if was_tied and _may_be_untied(model.config):
        say_tied(model.config, False)
        return replaced, True
    return replaced, False


def _distinct(model: nn.Module, holders: list[Holder]) -> set[int]:
    return {id(getattr(model.get_submodule(path), name)) for path, name in holders}


def _with_own(module: nn.Module, name: str) -> nn.Module:
    """A copy of a module, with a copy of one of its parameters; the other parameters are the same."""
    own = copy.copy(module)
    own._parameters = dict(module._parameters)
    parameter = getattr(module, name)
    new = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    own._parameters[name] = marked_as(parameter, new)
    return own


def _may_be_untied(config: Any) -> bool:
    """Whether a config that is read from a file keeps that nothing is tied."""
    said = copy.deepcopy(config)
    say_tied(said, False)
    return not type(config).from_dict(said.to_dict()).tie_word_embeddings
