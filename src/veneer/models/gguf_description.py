"""transformers' config → the keys of a GGUF file, by the table that reading goes by (`gguf_table`)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from veneer.device import CPU
from veneer.errors import ModelError
from veneer.models.gguf_layout import Array
from veneer.models.gguf_table import CAPS, DECODER, GPT2, GRANITE, NORMS, RMS, WINDOW_PERIOD, WRITTEN, YARN

Keys = dict[str, Any]


@dataclass(frozen=True)
class Description:
    """What a GGUF file says of a model, without its tensors. ``config``: of the model that the file holds, which may
    have fewer positions than the one that was described; ``keys``: with the architecture before them; ``tensors``:
    those that belong to the rotation; ``notes``: what llama.cpp does otherwise, as sentences."""

    architecture: str
    config: Any
    keys: Keys
    tensors: dict[str, Array] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def architecture_of(config: Any, name: str) -> str:
    """GGUF's name of the architecture of the model ``name``. Raises ModelError, with those that are written."""
    architecture = WRITTEN.get(config.model_type)
    if architecture is None:
        raise ModelError(
            f"{name} is a {config.model_type}, which Veneer does not write as GGUF; it writes {', '.join(WRITTEN)}. "
            f"Merge into a transformers folder instead (format: folder)."
        )
    return architecture


def describe(config: Any, name: str) -> Description:
    """The description of the model ``name``. Raises ModelError for an architecture that is not written, and for a
    rotation that the file has no keys for."""
    architecture = architecture_of(config, name)
    config, notes = _within_window(copy.deepcopy(config), architecture)
    if architecture == "gpt2":
        keys: Keys = {key: getattr(config, name) for key, name in GPT2.items()}
        keys["feed_forward_length"] = config.n_inner or 4 * config.n_embd
        tensors: dict[str, Array] = {}
    else:
        keys = {key: getattr(config, name) for key, name in DECODER.items()}
        more, tensors = _rotation(config, architecture, name)
        keys |= more | _heads(config, architecture)
    norm, its_field = NORMS.get(architecture, (RMS, "rms_norm_eps"))
    keys[norm] = float(getattr(config, its_field))
    keys["vocab_size"] = config.vocab_size
    keys |= _OF[architecture](config) if architecture in _OF else {}
    return Description(
        architecture, config, {f"{architecture}.{key}": value for key, value in keys.items()}, tensors, notes
    )


def _within_window(config: Any, architecture: str) -> tuple[Any, list[str]]:
    """A model whose layers all see a window of positions, of which llama.cpp knows nothing: where it has no key, as
    many positions as are in one window, within which it is the same model."""
    window = getattr(config, "sliding_window", None)
    if architecture in WINDOW_PERIOD or not window or window >= config.max_position_embeddings:
        return config, []
    if architecture in ("phi3", "starcoder2"):
        return config, [f"llama.cpp ignores the window of {window:,} positions; beyond them its answers differ."]
    if config.model_type != "mistral":
        return config, []
    config.max_position_embeddings, config.sliding_window = window, None
    return config, [
        f"The file says a context of {window:,} positions, the width of the model's window, which GGUF has no key for "
        f"here; beyond them llama.cpp's answers would differ."
    ]


def _heads(config: Any, architecture: str) -> Keys:
    """The size of a head, where it is an option of the architecture."""
    if architecture in ("phi3", "starcoder2", "granite", "olmo2", "smollm3"):
        return {}
    size = head_dim(config)
    return {"attention.key_length": size, "attention.value_length": size}


def head_dim(config: Any) -> int:
    """The size of a head, whether a config has an option for it or not."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotation(config: Any, architecture: str, name: str) -> tuple[Keys, dict[str, Array]]:
    """How positions are rotated, in those layers that see all of them; the others have a key of their own."""
    all_of_it: dict[str, Any] = config.rope_parameters or {}
    rope = all_of_it.get("full_attention", all_of_it)
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1.0 and architecture != "phi3":
        raise ModelError(
            f"{name} rotates {share:g} of each head (partial_rotary_factor), and llama.cpp all of it in this "
            f"architecture."
        )
    rotated = int(head_dim(config) * share)
    keys: Keys = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": rotated}
    if "sliding_attention" in all_of_it:
        keys["rope.freq_base_swa"] = float(all_of_it["sliding_attention"]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return keys, {}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "linear":
        return keys, {}
    if kind == "yarn":
        # llama.cpp multiplies what YaRN gives by this key, and does not use yarn_attn_factor.
        usual = 0.1 * math.log(max(rope["factor"], 1.0)) + 1.0
        keys["rope.scaling.attn_factor"] = float(ROPE_INIT_FUNCTIONS[kind](config, CPU)[1]) / usual
        keys["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        return keys | {key: float(rope[own]) for key, own in YARN.items() if rope.get(own) is not None}, {}
    if kind == "longrope":
        keys["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        keys["rope.scaling.attn_factor"] = float(ROPE_INIT_FUNCTIONS[kind](config, CPU)[1])
        if architecture != "phi3":  # whose files never say it
            keys["rope.scaling.type"] = kind
        return keys, {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("short", "long")
        }
    if kind == "llama3":
        return keys, {"rope_freqs.weight": _llama3(rope, rotated)}
    raise ModelError(f"{name} rotates positions by {kind!r} (rope_type), which no key of a GGUF file says.")


def _llama3(rope: dict[str, Any], rotated: int) -> Array:
    """By what Llama 3's rotation divides each frequency; `gguf_rope.llama3_of` has the formula."""
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, rotated, 2) / rotated)
    length, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((length / waves - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / rope["factor"] + smooth), np.float32)


def _gemma2(config: Any) -> Keys:
    return _windows(config, 2) | {key: float(getattr(config, name) or 0) for key, name in CAPS.items()}


def _gemma3(config: Any) -> Keys:
    """llama.cpp has no cap of its attention."""
    cap = getattr(config, "final_logit_softcapping", None)
    return _windows(config, 6) | ({"final_logit_softcapping": float(cap)} if cap else {})


def _windows(config: Any, period: int) -> Keys:
    """The window, and which layers see no more than it, where they are not those that llama.cpp takes them to be."""
    narrow = [kind == "sliding_attention" for kind in config.layer_types]
    usual = [(layer + 1) % period != 0 for layer in range(len(narrow))]
    pattern = {} if narrow == usual else {"attention.sliding_window_pattern": narrow}
    return {"attention.sliding_window": config.sliding_window, **pattern}


def _window(config: Any) -> Keys:
    return {"attention.sliding_window": config.sliding_window or 0}


def _phi3(config: Any) -> Keys:
    """llama.cpp reads a Phi-3 without a window's key as one with a window."""
    return _window(config) | {"rope.scaling.original_context_length": config.original_max_position_embeddings}


def _granite(config: Any) -> Keys:
    return {key: float(getattr(config, name)) for key, name in GRANITE.items()}


_OF = {"gemma2": _gemma2, "gemma3": _gemma3, "phi3": _phi3, "starcoder2": _window, "granite": _granite}
