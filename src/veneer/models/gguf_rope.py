"""How a GGUF file says that positions are rotated → transformers' ``rope_parameters``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from veneer.models.gguf_keys import Keys
from veneer.models.gguf_table import YARN

_CLOSE = 1e-6  # relative; factors are kept in fp32


def rope_of(keys: Keys, head_dim: int, *, partial: bool = False, context: int) -> dict[str, Any]:
    """``rope_parameters`` of a model with heads of ``head_dim``, of which a part may be rotated (``partial``), and
    ``context`` positions.

    Raises ModelError for a rotation that transformers has not.
    """
    rotated = keys.take("rope.dimension_count", head_dim)
    if rotated != head_dim and not partial:
        raise keys.refuse("rope.dimension_count")
    rope = {"rope_theta": keys.take("rope.freq_base", 10000.0), "rope_type": "default"}
    if partial:
        share = rotated / head_dim
        rope["partial_rotary_factor"] = share if int(head_dim * share) == rotated else (rotated + 0.5) / head_dim
    return rope | _scaling(keys, rope["rope_theta"], rotated, context)


def _scaling(keys: Keys, theta: float, rotated: int, context: int) -> dict[str, Any]:
    kind = keys.take("rope.scaling.type")
    factor = keys.take("rope.scaling.factor", keys.take("rope.scale_linear")) or 1.0
    original = keys.take("rope.scaling.original_context_length", context)
    if kind is None:  # llama.cpp's default
        kind = "linear" if factor != 1.0 else "none"
    if kind in ("none", "longrope") and (factors := _long(keys)):
        return factors | {"original_max_position_embeddings": original}
    if kind == "none":
        return _by_factors(keys, theta, rotated, context)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else {}
    if kind == "yarn":
        return _yarn(keys, factor) | {"original_max_position_embeddings": original}
    raise keys.refuse("rope.scaling.type")


def _yarn(keys: Keys, factor: float) -> dict[str, Any]:
    """llama.cpp multiplies what YaRN gives for the attention by attn_factor; its converter writes transformers'
    attention_factor, which replaces it, as yarn_attn_factor."""
    if keys.take("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise keys.refuse("rope.scaling.yarn_ext_factor")
    made: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    attention = keys.take("rope.scaling.yarn_attn_factor")
    times = keys.take("rope.scaling.attn_factor", 1.0)
    if attention is not None:
        made["attention_factor"] = attention * times
    elif times != 1.0:
        made["attention_factor"] = times * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    names = {**YARN, "rope.scaling.yarn_log_multiplier": "mscale_all_dim"}
    given = {name: keys.take(key) for key, name in names.items()}
    made |= {name: value for name, value in given.items() if value is not None}
    if "mscale_all_dim" in made:
        made["mscale"] = 1.0
    return made


def _long(keys: Keys) -> dict[str, Any]:
    """Factors for short and for long texts, where the file has them."""
    short, long = keys.tensor("rope_factors_short.weight"), keys.tensor("rope_factors_long.weight")
    if short is None or long is None:
        return {}
    attention = keys.take("rope.scaling.attn_factor", 1.0)
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention}


def _by_factors(keys: Keys, theta: float, rotated: int, context: int) -> dict[str, Any]:
    """One factor a frequency: Llama 3's rotation where they are its own, else the factors themselves, which longrope
    takes for short and long texts alike."""
    factors = keys.tensor("rope_freqs.weight")
    if factors is None or all(factor == 1.0 for factor in factors):
        return {}
    if len(factors) != rotated // 2:
        raise keys.refuse("rope.dimension_count")
    return llama3_of(np.array(factors), theta, rotated) or {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }  # fmt: skip


def llama3_of(factors: np.ndarray[Any, np.dtype[Any]], theta: float, rotated: int) -> dict[str, Any] | None:
    """The parameters of Llama 3's rotation that give ``factors`` (rotated / 2,), or None where none do.

    A frequency f is divided by 1 below a wavelength of L/high, by F above L/low, and between by
    1 / ((1 − s)/F + s) with s = (L·f/2π − low) / (high − low): a line through f. Only L/low and L/high are in the
    factors, so low is 1.
    """
    frequency = theta ** -(np.arange(0, rotated, 2) / rotated) / (2 * math.pi)
    factor = float(factors.max())
    between = (factors > 1 + _CLOSE) & (factors < factor * (1 - _CLOSE))
    if between.sum() < 2:
        return None
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(frequency[between], smooth, 1)
    if start >= 0 or slope <= 0:
        return None
    high = round(1 - 1 / start, 3)
    length = round(slope * (high - 1))
    made = np.clip((length * frequency - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / ((1 - made) / factor + made), factors, rtol=_CLOSE, atol=0):
        return None
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }  # fmt: skip
