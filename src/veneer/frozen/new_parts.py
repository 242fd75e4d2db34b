"""Which parts of a model are in no checkpoint: what a class puts beside its backbone for a task, and starts random."""

from __future__ import annotations

import re
from typing import Any

import transformers
from torch import nn

from veneer.frozen.text_part import HEADS, end_of, text_config_of

# Tasks whose parts beside the backbone are no pretraining's.
_TASK = re.compile(r"For(\w*Classification|QuestionAnswering\w*|MultipleChoice|NextSentencePrediction)$")
_POOLER = re.compile(r"(^|\.)pooler\.")  # a body's part that checkpoints of other tasks lack
_READ = "_veneer_read"
_MARK = "_is_hf_initialized"  # transformers' own, on what it reads, so that it gives no initial values to it


def remember_checkpoint(model: nn.Module, missing: set[str], vocabulary: int | None) -> None:
    """Keep on the model which of its tensors its checkpoint lacked, and how many tokens that had."""
    model.__dict__[_READ] = (frozenset(missing), vocabulary)


def beside_backbone(model: Any) -> list[str]:
    """The names of the modules beside the backbone of a model without an output head over a vocabulary; [] where there
    is none, or no backbone can be recognised."""
    if not isinstance(model, transformers.PreTrainedModel) or _has_vocabulary_head(model):
        return []
    body = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
    children = dict(model.named_children())
    bodies = [name for name, m in children.items() if m is body or isinstance(m, transformers.PreTrainedModel)]
    others = [name for name, m in children.items() if name not in bodies and next(m.parameters(), None) is not None]
    return others if bodies else []


def task_parts(model: Any) -> list[str]:
    """`beside_backbone` of a class for a task that no checkpoint is pretrained for: to classify sequences, tokens,
    images or sound, to answer questions."""
    return beside_backbone(model) if _TASK.search(type(model).__name__) else []


def may_be_missing(model: Any, key: str) -> bool:
    """Whether a checkpoint of another task lacks the tensor ``key`` of this model."""
    return _POOLER.search(key) is not None or any(key.startswith(f"{part}.") for part in task_parts(model))


def new_parts(model: Any, modules: dict[str, nn.Module]) -> tuple[list[str], list[str]]:
    """The modules whose parameters are in no checkpoint, and the parameters of that kind that belong to none of them.

    ``modules``: the model's own, by name. Where it is not known how the model was read, they are its `task_parts`. A
    sequence classifier's head always is one, since that is what it is trained for.
    """
    missing = _missing(model, modules)
    if missing is None:
        return task_parts(model), []
    head = [name for name in HEADS if name in task_parts(model) and _classifies_sequences(model)]
    parts = [name for name in beside_backbone(model) if _any_in(name, missing) or name in head]
    resized, left = _resized(model), list[str]()
    for key in sorted(missing):
        owner = key.rpartition(".")[0]
        if modules[owner] in resized:  # of these the rows are new
            left += [key] if not key.endswith(".weight") else []
            continue
        if any(key.startswith(f"{part}.") for part in parts) or owner in parts:
            continue
        if _POOLER.search(key) or _is_outside(model, key):
            simple = owner and not modules[owner]._modules
            (parts if simple else left).append(owner if simple else key)
    return [name for name in modules if name in parts], left


def resized_from(model: Any) -> int | None:
    """How many tokens the checkpoint has, where the model was given another number since; None elsewhere.

    The configs are compared, since some models have rows beyond their vocabulary.
    """
    there, now = _vocabulary(model), getattr(text_config_of(getattr(model, "config", None)), "vocab_size", None)
    return there if there is not None and now is not None and there != now else None


def _vocabulary(model: Any) -> int | None:
    """How many tokens the checkpoint has that the model was read from; None where that is not known."""
    if _READ in model.__dict__:
        vocabulary: int | None = model.__dict__[_READ][1]
        return vocabulary
    config, name = getattr(model, "config", None), getattr(model, "name_or_path", None)
    if not isinstance(config, transformers.PretrainedConfig) or not name:
        return None
    try:
        read = type(config).from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):  # made from a config, or no longer there
        return None
    return getattr(text_config_of(read), "vocab_size", None)


def _missing(model: Any, modules: dict[str, nn.Module]) -> set[str] | None:
    """The names of the parameters that were in no checkpoint; None where nothing says so."""
    own = {
        f"{path}.{name}" if path else name: parameter
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    if _READ in model.__dict__:
        return set(model.__dict__[_READ][0]) & set(own)
    read = {key for key, parameter in own.items() if getattr(parameter, _MARK, False)}
    return set(own) - read if read else None


def marked_as(old: nn.Parameter | None, new: nn.Parameter) -> nn.Parameter:
    """``new``, which takes the place of ``old``, with its mark."""
    if getattr(old, _MARK, False):
        setattr(new, _MARK, True)
    return new


def is_known(model: nn.Module) -> bool:
    """Whether it is known from which checkpoint the model was read."""
    return _READ in model.__dict__ or any(getattr(parameter, _MARK, False) for parameter in model.parameters())


def _resized(model: Any) -> list[nn.Module]:
    """The input embedding and output head, where they have another number of tokens than the checkpoint."""
    modules = list[Any]()
    if resized_from(model) is None:
        return modules
    for end in ("input", "output"):
        module = end_of(model, end)
        modules.append(getattr(module, "base", module))
    return [m for m in modules if m is not None]


def _any_in(part: str, keys: set[str]) -> bool:
    return any(key.startswith(f"{part}.") for key in keys)


def _is_outside(model: Any, key: str) -> bool:
    """Whether a parameter belongs to no backbone."""
    bodies = {model.base_model_prefix} | {
        name for name, m in model.named_children() if isinstance(m, transformers.PreTrainedModel)
    }
    has_body = any(hasattr(model, name) for name in bodies if name)
    return has_body and key.split(".")[0] not in bodies


def _classifies_sequences(model: Any) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _has_vocabulary_head(model: Any) -> bool:
    return end_of(model, "output") is not None
