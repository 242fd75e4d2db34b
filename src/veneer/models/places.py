"""Tensors of a checkpoint that its model has no place for. A few kinds are of no use to it; all others are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from veneer.errors import ModelError
from veneer.models.library import some_of

# Constants that older versions of transformers wrote, and that a model computes from its config.
_CONSTANTS = (r"rotary_emb\.(original_)?inv_freq$", r"(^|\.)position_ids$", r"(^|\.)attn\.masked_bias$")
_OTHER_TASKS = (r"(^|\.)pooler\.", r"(^|\.)seq_relationship\.")  # parts of a body that only some tasks have
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def without_place(model: Any, keys: Iterable[str], kind: str) -> list[str]:
    """Those of ``keys``, names of tensors that are not the model's own, that must not be dropped.

    Dropped are: what the model's class says that it ignores (``_keys_to_ignore_on_load_unexpected``), its constants
    (rotary frequencies, positions), layers that predict further tokens (``num_nextn_predict_layers`` of the config),
    and, where the checkpoint is of another task than ``kind``, the head of that task.
    """
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_CONSTANTS]
    constants = {name for name, _ in model.named_buffers()}
    other_task = kind == "classification" or _of_another_class(model)
    return sorted(
        key
        for key in keys
        if key not in constants
        and not any(re.search(pattern, key) for pattern in ignored)
        and not _predicts_further(model.config, key)
        and not (other_task and _is_of_a_head(model, key))
    )


def refuse_without_place(model: Any, keys: Iterable[str], kind: str, name: str) -> None:
    """Raises ModelError where `without_place` names any of the tensors ``keys`` of the model ``name``."""
    wrong = without_place(model, keys, kind)
    if wrong:
        raise ModelError(
            f"The checkpoint of {name} holds what its model has no place for: {some_of(wrong)}; it belongs to another "
            f"config.json, or is in a form that cannot be read."
        )


def _of_another_class(model: Any) -> bool:
    written = getattr(model.config, "architectures", None)
    return isinstance(written, list) and bool(written) and str(written[0]) != type(model).__name__


def _is_of_a_head(model: Any, key: str) -> bool:
    """Whether a tensor is outside of the body, in a part that this model has not; or a body's part for other tasks."""
    first = key.split(".")[0]
    body = getattr(model, model.base_model_prefix, model)
    known = {model.base_model_prefix, *(name for part in (model, body) for name, _ in part.named_children())}
    return ("." in key and first not in known) or any(re.search(pattern, key) for pattern in _OTHER_TASKS)


def _predicts_further(config: Any, key: str) -> bool:
    text = config.get_text_config()
    layers, more = getattr(text, "num_hidden_layers", None), getattr(text, "num_nextn_predict_layers", None) or 0
    match = _LAYER.search(key)
    return bool(match and layers and layers <= int(match[1]) < layers + more)
