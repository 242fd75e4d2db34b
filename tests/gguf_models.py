"""Tiny models of any architecture as GGUF files: keys and tensors as llama.cpp's converter writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gguf_file import write_tokenizer

_RENAMED = {
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "mistral": "llama", "umt5": "t5",
    "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
}  # fmt: skip


def write_model(
    path: Path,
    model: Any,
    tokenizer: Any,
    *,
    without: tuple[str, ...] = (),
    tensors: Any = None,
    split: str = "default",
    **more: Any,
) -> None:
    """``more``: keys to write in place of, or besides, the model's own; ``without``: keys to leave out. Both without
    the architecture; dots as in the file. A value is a number, a string, a bool or a list of one of these.
    ``tensors``: to write besides; ``split``: how the tokenizer splits text."""
    kind = _RENAMED.get(model.config.model_type, model.config.model_type)
    writer = gguf.GGUFWriter(path, kind)
    for key, value in (_keys(model.config, kind) | more).items():
        if value is not None and key not in without:
            _write(writer, key if key.startswith(("general.", "split.", "clip.")) else f"{kind}.{key}", value)
    write_tokenizer(writer, tokenizer, split)
    for name, array in (_tensors(model, kind) | _rope_tensors(model.config) | (tensors or {})).items():
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _keys(config: Any, kind: str) -> dict[str, Any]:
    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    rms = first("rms_norm_eps")
    made = {
        "block_count": first("num_hidden_layers", "n_layer"),
        "context_length": first("max_position_embeddings", "n_positions"),
        "embedding_length": first("hidden_size", "n_embd"),
        "feed_forward_length": first("ffn_hidden_size", "intermediate_size", "n_inner", "d_ff")
        or 4 * config.hidden_size,
        "attention.head_count": first("num_attention_heads", "n_head"),
        "attention.head_count_kv": first("num_kv_heads", "num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": rms,
        "attention.layer_norm_epsilon": None
        if rms
        else first("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
        "vocab_size": config.vocab_size,
        "attention.sliding_window": first("sliding_window"),
        "attn_logit_softcapping": first("attn_logit_softcapping"),
        "final_logit_softcapping": first("final_logit_softcapping"),
        "expert_count": first("num_experts"),
        "expert_used_count": first("num_experts_per_tok"),
        "expert_feed_forward_length": first("moe_intermediate_size"),
        "expert_shared_feed_forward_length": first("shared_expert_intermediate_size"),
    }
    if kind == "granite":
        made |= {
            "attention.scale": config.attention_multiplier, "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": config.residual_multiplier, "logit_scale": float(config.logits_scaling),
        }  # fmt: skip
    if kind == "bloom":
        made |= {"feed_forward_length": 4 * config.hidden_size}
    if kind == "falcon":
        made |= {"tensor_data_layout": "jploski"}
    if kind == "stablelm":
        made |= {"use_parallel_residual": config.use_parallel_residual}
    if kind == "mamba":
        made |= {
            "feed_forward_length": 0, "attention.head_count": 0, "context_length": 2**20,
            "ssm.conv_kernel": config.conv_kernel, "ssm.inner_size": config.intermediate_size,
            "ssm.state_size": config.state_size, "ssm.time_step_rank": config.time_step_rank, "ssm.dt_b_c_rms": False,
            "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon, "attention.layer_norm_epsilon": None,
        }  # fmt: skip
    if kind == "t5":
        made |= {
            "decoder_block_count": config.num_decoder_layers, "attention.key_length": config.d_kv,
            "attention.value_length": config.d_kv, "context_length": 512,
            "attention.relative_buckets_count": config.relative_attention_num_buckets,
            "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
            "decoder_start_token_id": config.decoder_start_token_id,
        }  # fmt: skip
    if kind == "lfm2":
        groups = [config.num_key_value_heads * (layer == "full_attention") for layer in config.layer_types]
        made |= {
            "attention.head_count_kv": groups, "shortconv.l_cache": config.conv_L_cache,
            "attention.layer_norm_rms_epsilon": config.norm_eps, "attention.layer_norm_epsilon": None,
        }  # fmt: skip
    if kind.startswith("qwen35"):
        made |= {
            "full_attention_interval": 4, "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim, "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
            "rope.dimension_sections": [*config.rope_parameters["mrope_section"], 0],
        }  # fmt: skip
    return made | _rope_keys(config, kind)


def _head_dim(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _rope(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    return dict(rope.get("full_attention", rope))


def _rope_keys(config: Any, kind: str) -> dict[str, Any]:
    rope = _rope(config)
    if not rope:
        return {}
    size = _head_dim(config)
    made = {"rope.freq_base": float(rope["rope_theta"])}
    if kind not in ("falcon", "stablelm", "starcoder2", "phi3", "lfm2", "granite", "olmo2", "smollm3"):
        made |= {"attention.key_length": size, "attention.value_length": size}
    if kind in ("llama", "smollm3", "granite", "phi3", "stablelm", "nemotron", "qwen35", "qwen35moe"):
        made |= {"rope.dimension_count": int(size * rope.get("partial_rotary_factor", 1.0))}
    if rope["rope_type"] in ("linear", "yarn"):
        made |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        names = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        made |= {f"rope.scaling.{key}": rope[name] for name, key in names.items() if name in rope}
        made |= {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    if kind == "phi3":
        original, context = config.original_max_position_embeddings, config.max_position_embeddings
        made |= {
            "rope.scaling.original_context_length": original,
            "attention.sliding_window": config.sliding_window or 0,
        }
        if rope["rope_type"] == "longrope":
            factor = math.sqrt(1 + math.log(context / original) / math.log(original))
            made |= {"rope.scaling.attn_factor": factor}
    return made


def _rope_tensors(config: Any) -> dict[str, Any]:
    """The factors that the converter computes for Llama 3, and those of longrope."""
    rope = _rope(config)
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{length}.weight": rope[f"{length}_factor"] for length in ("short", "long")}
    if rope.get("rope_type") != "llama3":
        return {}
    size, factor, length = _head_dim(config), rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for frequency in np.float32(1) / np.float32(rope["rope_theta"]) ** (np.arange(0, size, 2, dtype=np.float32) / size):
        wave = 2 * math.pi / frequency
        smooth = (length / wave - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if wave < length / high else factor if wave > length / low else middle)
    return {"rope_freqs.weight": factors}


def _tensors(model: Any, kind: str) -> dict[str, Any]:
    config, made = model.config, {}
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), config.num_hidden_layers + 1
    )
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    for key, array in state.items():
        tied = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)  # of T5 it says so
        if (key == "lm_head.weight" and tied) or key.endswith("coder.embed_tokens.weight"):
            continue
        if key.endswith("experts.gate_up_proj"):  # two tensors in the file
            layer = key.split(".")[2]
            gate, up = np.split(array, 2, axis=1)
            made |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
            continue
        named = key.removeprefix("transformer.") if kind == "bloom" else key
        name = names.get_name(named, (".weight", ".bias"))
        if key.endswith("linear_attn.dt_bias"):
            name = f"blk.{key.split('.')[2]}.ssm_dt.bias"
        assert name, f"gguf has no name for {key}"
        if key.endswith("experts.down_proj"):
            name += ".weight"
        made[name] = _as_kept(key, array, config, kind)
    return made


def _as_kept(key: str, array: Any, config: Any, kind: str) -> Any:
    """What the converter does to a tensor of an architecture."""
    if kind in ("llama", "smollm3", "granite") and (
        "q_proj" in key or "k_proj" in key
    ):  # llama.cpp rotates neighbours, transformers halves
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if kind in ("gemma2", "gemma3", "nemotron") and key.endswith("norm.weight"):
        return array + 1
    if kind == "gpt2" and key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return array.T
    if key.endswith("shared_expert_gate.weight"):
        return array[0]
    if key.endswith("A_log"):
        return -np.exp(array)
    if key.endswith(("conv1d.weight", "conv.conv.weight")):
        return array[:, 0]
    if kind.startswith("qwen35") and key.endswith("norm.weight") and "linear_attn" not in key:
        return array + 1
    if kind in ("falcon", "bloom") and "query_key_value" in key:
        groups = config.num_kv_heads if kind == "falcon" else config.n_head
        size = config.hidden_size // config.num_attention_heads
        parts = array.reshape(groups, -1, size, *array.shape[1:])
        split = (parts[:, :-2], parts[:, -2:-1], parts[:, -1:])
        return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in split])
    return array
