"""What an adapter trains and saves beside its updates since no checkpoint has it."""

from __future__ import annotations

import re

from torch import nn

from veneer.errors import shown
from veneer.frozen.new_parts import is_known, new_parts, resized_from
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.patterns import whole_name
from veneer.updates.select import classification_head, matching_suffix, modules_of
from veneer.updates.ties import row_groups


def with_new_parts(model: nn.Module, config: LoRA | AdaLoRA) -> tuple[LoRA | AdaLoRA, str | None]:
    """``config`` and what is in no checkpoint, to be trained whole, and a sentence about it where that is known.

    A part that ``config`` names, in targets or train_also, is left to it. There is no sentence about a sequence
    classifier's head alone, which is trained in any case.
    """
    modules = modules_of(model)
    parts, no_part = new_parts(model, modules)
    whole = {name for ending in config.train_also for name in matching_suffix(ending, modules)}
    targeted = [part for part in parts if _targets_name(config, part)]
    left = _left(no_part, targeted if is_known(model) else [])
    parts = [part for part in parts if part not in targeted and not any(_meet(part, other) for other in whole)]
    rows = _new_rows(model, config, whole)
    if not parts and not rows:
        return config, left
    inside = [name for name in modules if any(name == part or name.startswith(f"{part}.") for part in parts)]
    wider = config.model_copy(
        update={
            "train_also": [*config.train_also, *parts],
            "new_tokens": [*config.new_tokens, *rows],
            "exclude": _excluding(config, inside, modules),
        }
    )
    return wider, _said(model, parts, rows, left)


def _targets_name(config: LoRA | AdaLoRA, part: str) -> bool:
    return isinstance(config.targets, list) and any(t == part or t.startswith(f"{part}.") for t in config.targets)


def _meet(part: str, other: str) -> bool:
    return part == other or part.startswith(f"{other}.") or other.startswith(f"{part}.")


def _excluding(config: LoRA | AdaLoRA, inside: list[str], modules: dict[str, nn.Module]) -> str | list[str]:
    """``exclude``, and the modules inside of new parts that named targets would reach."""
    if config.targets == "all-linear":
        return config.exclude
    reached = [name for name in inside if _reaches(config.targets, name, modules)]
    if isinstance(config.exclude, list):
        return [*config.exclude, *reached]
    return "|".join([f"(?:{config.exclude})", *map(re.escape, reached)])


def _reaches(targets: str | list[str], name: str, modules: dict[str, nn.Module]) -> bool:
    if isinstance(targets, str):
        return whole_name(targets, name, f"targets = {shown(targets)}")
    return any(name in matching_suffix(target, modules) for target in targets)


def _new_rows(model: nn.Module, config: LoRA | AdaLoRA, whole: set[str]) -> list[int]:
    """The tokens beyond the checkpoint's vocabulary, unless the embedding is trained whole or by a low rank."""
    groups = row_groups(model)
    there = resized_from(model) if groups else None
    if there is None:
        return []
    embedding = next(iter(groups[0].values()))
    assert isinstance(embedding, nn.Embedding)
    otherwise = whole | {
        name for target in config.targets if isinstance(config.targets, list)
        for name in matching_suffix(target, groups[0])
    }  # fmt: skip
    if otherwise & set(groups[0]):
        return []
    return [token for token in range(there, embedding.num_embeddings) if token not in config.new_tokens]


def _said(model: nn.Module, parts: list[str], rows: list[int], left: str | None) -> str | None:
    if not is_known(model) or (not rows and parts == [classification_head(model)]):
        return left
    named = list(parts)
    if rows:
        named.append(f"the vocabulary's rows {rows[0]} to {rows[-1]}" if len(rows) > 1 else f"row {rows[0]}")
    start = f"{', '.join(named)} {'is' if len(named) == 1 and len(rows) < 2 else 'are'} in no checkpoint"
    return " ".join(filter(None, [f"{start}: trained whole, and saved with the adapter.", left]))


def _left(no_part: list[str], targeted: list[str]) -> str | None:
    """Sentences about what is in no checkpoint and will not be in the adapter either."""
    sentences = []
    if no_part:
        sentences.append(f"{', '.join(no_part)} is in no checkpoint, and is neither trained nor saved.")
    if targeted:
        sentences.append(
            f"{', '.join(targeted)} is in no checkpoint and gets a low-rank update, which alone is saved: keep this "
            f"base with save_pretrained, or leave it out of targets to train it whole."
        )
    return " ".join(sentences) or None
