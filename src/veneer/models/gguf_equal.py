"""Whether what a GGUF file says is the model that it was written from: a file that says less is refused before it has
its name."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from veneer.errors import ModelError
from veneer.models.gguf_description import head_dim
from veneer.models.library import some_of
from veneer.models.stream import unfilled_model

# Fields that say nothing of the function that the model computes: names and versions, training, generation, output.
_HARMLESS = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path", "model_type",
    "use_cache", "initializer_range", "attention_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop",
    "residual_dropout",
    "embedding_dropout", "hidden_dropout", "pretraining_tp", "id2label", "label2id", "problem_type", "num_labels",
    "bos_token_id", "eos_token_id", "pad_token_id", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "task_specific_params", "cache_implementation", "is_encoder_decoder",
    "quantization_config", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "attn_implementation", "_attn_implementation", "use_return_dict", "max_window_layers",
}  # fmt: skip
# Compared by what they do: the head by its tensors, rotations by their frequencies.
_BY_FUNCTION = {"tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
_CLOSE = 2e-6  # relative: factors and epsilons are in fp32 in the file


def refuse_other_model(written: Any, read: Any, name: str) -> None:
    """Raises ModelError where ``read``, the config that a file is read as, is another model's than ``written``, the
    config of the model ``name``; it names the fields."""
    ours, theirs = (_plain(config) for config in (written, read))
    differing = [key for key in sorted(ours | theirs) if not _same(ours.get(key), theirs.get(key))]
    if not differing and not _rotate_alike(written, read):
        differing = ["rope_parameters"]
    if differing:
        values = some_of([f"{key} = {ours.get(key)!r:.60}" for key in differing])
        raise ModelError(
            f"A GGUF file of {name} would be another model: it cannot say {values}. Merge into a transformers folder "
            f"instead (format: folder)."
        )


def _plain(config: Any) -> dict[str, Any]:
    fields = {key: value for key, value in config.to_dict().items() if key not in _HARMLESS | _BY_FUNCTION}
    if config.model_type == "gpt2":
        return fields | {"n_inner": config.n_inner or 4 * config.n_embd}
    return fields | {"head_dim": head_dim(config)}


def _same(one: Any, other: Any) -> bool:
    """Nothing, no and none are one."""
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=_CLOSE)
    return bool(one == other) or (not one and not other)


def _rotate_alike(written: Any, read: Any) -> bool:
    ours, theirs = _rotations(written), _rotations(read)
    return len(ours) == len(theirs) and all(
        torch.allclose(one, other, rtol=_CLOSE, atol=0) for one, other in zip(ours, theirs, strict=True)
    )


def _rotations(config: Any) -> list[torch.Tensor]:
    """The frequencies of a model's rotations, and what it multiplies them by; of longrope those of long texts, too."""
    model = unfilled_model("causal", copy.deepcopy(config), torch.float32, config.model_type)
    found: list[torch.Tensor] = []
    for module in model.modules():
        buffers = {key: tensor for key, tensor in module.named_buffers(recurse=False) if key.endswith("inv_freq")}
        for key, tensor in sorted(buffers.items()):
            scaling = getattr(module, key.replace("inv_freq", "attention_scaling"), None)
            found.append(tensor.float() * float(1.0 if scaling is None else scaling))
    rope = getattr(config, "rope_parameters", None) or {}
    for length in ("short_factor", "long_factor"):
        if length in rope:
            found.append(torch.tensor(rope[length]))
    return found
