"""A GGUF file's keys → transformers' config, architecture by architecture. What nobody here takes over is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from veneer.errors import ModelError
from veneer.models.gguf_header import GgufHeader
from veneer.models.gguf_keys import Keys
from veneer.models.gguf_rope import rope_of
from veneer.models.gguf_table import CAPS, DECODER, GEMMA_27B, GPT2, GRANITE, NORM, RMS, UNROTATED_PERIOD, WINDOW_PERIOD
from veneer.models.library import call_library, no_model


def gguf_config(header: GgufHeader) -> Any:
    """transformers' config of the model in a GGUF file.

    Raises ModelError for an architecture that is not read, and for keys, values and tensors of the config that are not
    known: it names them.
    """
    if header.architecture in READ_BY_TRANSFORMERS:
        return _by_transformers(header)
    build = _BUILDERS.get(header.architecture)
    if build is None:
        readable = ", ".join(sorted((*_BUILDERS, *READ_BY_TRANSFORMERS)))
        raise ModelError(
            f"{header.name} is a GGUF file of the architecture {header.architecture!r}, which cannot be read; what can "
            f"be: {readable}."
        )
    if "token_embd.weight" not in header.tensors:
        raise ModelError(f"{header.name} lacks token_embd.weight; it is incomplete, or holds no model.")
    keys = Keys(header)
    keys.refuse_layers_without_tensors()  # before anything is made for each of them
    fields = build(keys)
    keys.refuse_others()
    return call_library(transformers.AutoConfig.for_model, no_model(header.name), **(_of_all(header) | fields))


def _of_all(header: GgufHeader) -> dict[str, Any]:
    vocabulary = header.tensors["token_embd.weight"].shape[0]
    ids = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    given = {name: header.metadata.get(f"tokenizer.ggml.{key}") for name, key in ids.items()}
    return {
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{name: value if value is not None and value < vocabulary else None for name, value in given.items()},
    }


def _decoder(keys: Keys, norm: str = RMS, norm_field: str = "rms_norm_eps") -> dict[str, Any]:
    """What nearly all decoders have."""
    if not keys.take("attention.head_count_kv"):
        keys.assume("attention.head_count_kv", keys.require("attention.head_count"))
    return {**{field: keys.require(key) for key, field in DECODER.items()}, norm_field: keys.require(norm)}


def _head_dim(keys: Keys, fields: dict[str, Any], default: int | None = None) -> int:
    """The size of a head; of queries, keys and values alike, since transformers has one."""
    plain = default or fields["hidden_size"] // fields["num_attention_heads"]
    size: int = keys.take("attention.key_length", plain)
    if keys.take("attention.value_length", size) != size:
        raise keys.refuse("attention.value_length")
    return size


def _rotated(keys: Keys, fields: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Heads and their rotation, of an architecture whose config says the size of a head."""
    size = _head_dim(keys, fields)
    rope = rope_of(keys, size, partial=partial, context=fields["max_position_embeddings"])
    return fields | {"head_dim": size, "rope_parameters": rope}


def _rotated_plain(keys: Keys, fields: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """The same of one whose heads are hidden_size / heads, and whose config has no other."""
    made = _rotated(keys, fields, partial=partial)
    if made.pop("head_dim") != fields["hidden_size"] // fields["num_attention_heads"]:
        raise keys.refuse("attention.key_length")
    return made


def _llama(keys: Keys) -> dict[str, Any]:
    fields = _decoder(keys)
    if not keys.take("attention.key_length"):  # files of early converters say it by the rotation alone
        rotated = keys.take("rope.dimension_count")
        fields |= {"head_dim": rotated} if rotated else {}
    holds = keys.header.holds
    biases = [holds(f"{part}.bias") for part in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")]
    fields |= {"attention_bias": any(biases[:2]), "mlp_bias": any(biases[2:])}
    size = _head_dim(keys, fields, fields.get("head_dim"))
    rope = rope_of(keys, size, context=fields["max_position_embeddings"])
    return fields | {"model_type": "llama", "head_dim": size, "rope_parameters": rope}


def _smollm3(keys: Keys) -> dict[str, Any]:
    """Which layers rotate no positions is llama.cpp's own rule."""
    fields = _rotated_plain(keys, _decoder(keys))
    period = UNROTATED_PERIOD["smollm3"]
    layers = range(1, fields["num_hidden_layers"] + 1)
    return {
        "model_type": "smollm3", **fields, "no_rope_layers": [int(layer % period != 0) for layer in layers],
        "no_rope_layer_interval": period, "attention_bias": keys.header.holds("attn_q.bias"),
        "mlp_bias": keys.header.holds("ffn_up.bias"),
    }  # fmt: skip


def _granite(keys: Keys) -> dict[str, Any]:
    fields = _rotated_plain(keys, _decoder(keys))
    size = fields["hidden_size"] // fields["num_attention_heads"]
    missing = {"attention.scale": size**-0.5, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0}
    scales = {field: keys.take(key) or missing[key] for key, field in GRANITE.items()}  # llama.cpp: 0 is none
    biases = {"attention_bias": keys.header.holds("attn_q.bias"), "mlp_bias": keys.header.holds("ffn_up.bias")}
    return {"model_type": "granite", **fields, **scales, **biases}


def _olmo2(keys: Keys) -> dict[str, Any]:
    """With a window it is an OLMo 3, which is not read."""
    return {"model_type": "olmo2", **_rotated_plain(keys, _decoder(keys))}


def _qwen2(keys: Keys) -> dict[str, Any]:
    return {"model_type": "qwen2", **_rotated(keys, _decoder(keys))}


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {"model_type": "qwen3", **_rotated(keys, _decoder(keys)), "attention_bias": keys.header.holds("attn_q.bias")}


def _mixture(keys: Keys) -> dict[str, Any]:
    """Experts, and how many of them a token has. Their width is also in their tensors, for files that do not say it."""
    down = keys.header.tensors.get("blk.0.ffn_down_exps.weight")
    width = keys.take("expert_feed_forward_length", down.shape[-1] if down else None)
    for key, values in {"expert_gating_func": (0, 1), "expert_weights_scale": (0.0, 1.0)}.items():
        if keys.take(key, values[0]) not in values:
            raise keys.refuse(key)
    return {
        "num_experts": keys.require("expert_count"),
        "num_experts_per_tok": keys.require("expert_used_count"),
        "moe_intermediate_size": width,
    }


def _qwen2moe(keys: Keys) -> dict[str, Any]:
    fields = _rotated(keys, _decoder(keys)) | _mixture(keys)
    shared = keys.header.tensors.get("blk.0.ffn_down_shexp.weight")
    fields["shared_expert_intermediate_size"] = keys.take(
        "expert_shared_feed_forward_length", shared.shape[-1] if shared else fields["intermediate_size"]
    )
    return {"model_type": "qwen2_moe", **fields, "norm_topk_prob": bool(keys.take("expert_weights_norm", False))}


def _qwen3moe(keys: Keys) -> dict[str, Any]:
    fields = _rotated(keys, _decoder(keys)) | _mixture(keys)
    return {"model_type": "qwen3_moe", **fields, "norm_topk_prob": bool(keys.take("expert_weights_norm", True))}


def _windows(keys: Keys, layers: int, period: int) -> dict[str, Any]:
    """Which layers see a window of positions: all but each ``period``-th, or as the file says."""
    pattern = keys.take("attention.sliding_window_pattern", period)
    narrow = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in range(layers)]
    return {
        "sliding_window": keys.require("attention.sliding_window"),
        "layer_types": ["sliding_attention" if one else "full_attention" for one in narrow],
    }


def _gemma(keys: Keys) -> dict[str, Any]:
    """What Gemma 2 and 3 share. No key has the queries' scale: llama.cpp knows it by the number of layers."""
    fields = _decoder(keys)
    layers, architecture = fields["num_hidden_layers"], keys.header.architecture
    fields |= {"head_dim": _head_dim(keys, fields, 256)} | _windows(keys, layers, WINDOW_PERIOD[architecture])
    large = layers == GEMMA_27B[architecture]
    scalar = fields["hidden_size"] // fields["num_attention_heads"] if large else fields["head_dim"]
    return fields | {"query_pre_attn_scalar": scalar}


def _gemma2(keys: Keys) -> dict[str, Any]:
    fields = _gemma(keys)
    return {
        **fields,
        "model_type": "gemma2",
        "rope_parameters": rope_of(keys, fields["head_dim"], context=fields["max_position_embeddings"]),
        "attn_logit_softcapping": keys.take("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.take("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    fields = _gemma(keys)
    narrow = {"rope_type": "default", "rope_theta": keys.take("rope.freq_base_swa", 10000.0)}
    if keys.take("rope.freq_base") is None:
        keys.assume("rope.freq_base", 1_000_000.0)  # llama.cpp's default for it alone
    wide = rope_of(keys, fields["head_dim"], context=fields["max_position_embeddings"])
    return {
        **fields,
        "model_type": "gemma3_text",
        "rope_parameters": {"full_attention": wide, "sliding_attention": narrow},
        **{field: keys.take(key) or None for key, field in CAPS.items()},
    }


def _phi3(keys: Keys) -> dict[str, Any]:
    fields = _rotated_plain(keys, _decoder(keys), partial=True)
    rope = fields["rope_parameters"]
    if rope["rope_type"] not in ("default", "longrope"):  # transformers has no other for it
        raise keys.refuse("rope.scaling.type")
    original = keys.take("rope.scaling.original_context_length", fields["max_position_embeddings"])
    window = keys.take("attention.sliding_window") or None  # llama.cpp's converter writes 0 for none
    return {
        "model_type": "phi3", **fields, "sliding_window": window, "original_max_position_embeddings": original,
    }  # fmt: skip


def _starcoder2(keys: Keys) -> dict[str, Any]:
    fields = _rotated_plain(keys, _decoder(keys, NORM, "norm_epsilon"))
    window = keys.take("attention.sliding_window") or None
    return {
        "model_type": "starcoder2", **fields, "sliding_window": window, "use_bias": keys.header.holds("attn_q.bias"),
    }  # fmt: skip


def _stablelm(keys: Keys) -> dict[str, Any]:
    fields = _rotated_plain(keys, _decoder(keys, NORM, "layer_norm_eps"), partial=True)
    parallel = not keys.header.holds("ffn_norm.weight")
    if keys.take("use_parallel_residual", parallel) != parallel:
        raise keys.refuse("use_parallel_residual")
    bias = keys.header.holds("attn_q.bias")
    return {"model_type": "stablelm", **fields, "use_qkv_bias": bias, "use_parallel_residual": parallel}


def _nemotron(keys: Keys) -> dict[str, Any]:
    norm = RMS if keys.take(RMS) is not None else NORM
    fields = _rotated(keys, _decoder(keys, norm, "norm_eps"), partial=True)
    holds = keys.header.holds
    return {
        "model_type": "nemotron", **fields, "attention_bias": holds("attn_q.bias"), "mlp_bias": holds("ffn_up.bias"),
    }  # fmt: skip


def _falcon(keys: Keys) -> dict[str, Any]:
    """Falcon 7B has one head of keys; the others' decoder has groups of them, and one norm or two."""
    fields = _rotated_plain(keys, _decoder(keys, NORM, "layer_norm_epsilon"))
    groups = fields.pop("num_key_value_heads")
    two_norms = keys.header.holds("attn_norm_2.weight")
    return {
        **fields,
        "model_type": "falcon",
        "ffn_hidden_size": fields.pop("intermediate_size"),
        "num_kv_heads": groups,
        "multi_query": groups == 1,
        "new_decoder_architecture": groups > 1 or two_norms,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "tie_word_embeddings": True,  # where the file has another head, they are untied as everywhere
    }


def _bloom(keys: Keys) -> dict[str, Any]:
    width = keys.require("embedding_length")
    if keys.take("feed_forward_length", 4 * width) != 4 * width:
        raise keys.refuse("feed_forward_length")
    heads = keys.require("attention.head_count")
    if keys.take("attention.head_count_kv", heads) != heads:
        raise keys.refuse("attention.head_count_kv")
    keys.take("context_length")  # its positions are distances
    return {
        "model_type": "bloom",
        "n_layer": keys.require("block_count"),
        "hidden_size": width,
        "n_head": heads,
        "layer_norm_epsilon": keys.require(NORM),
        "tie_word_embeddings": True,
    }


def _gpt2(keys: Keys) -> dict[str, Any]:
    fields = {field: keys.require(key) for key, field in GPT2.items()}
    return {"model_type": "gpt2", **fields, "layer_norm_epsilon": keys.require(NORM)}


def _mamba(keys: Keys) -> dict[str, Any]:
    for key, value in {"feed_forward_length": 0, "attention.head_count": 0, "ssm.dt_b_c_rms": False}.items():
        if keys.take(key, value) != value:
            raise keys.refuse(key)
    keys.take("context_length")  # it has no positions
    width = keys.require("embedding_length")
    expand, rest = divmod(keys.require("ssm.inner_size"), width)
    if rest:
        raise keys.refuse("ssm.inner_size")
    return {
        "model_type": "mamba",
        "num_hidden_layers": keys.require("block_count"),
        "hidden_size": width,
        "expand": expand,
        "conv_kernel": keys.require("ssm.conv_kernel"),
        "state_size": keys.require("ssm.state_size"),
        "time_step_rank": keys.require("ssm.time_step_rank"),
        "layer_norm_epsilon": keys.require(RMS),
    }


def _t5(keys: Keys) -> dict[str, Any]:
    """T5 has one table of distances for all layers, UMT5 one for each."""
    holds = keys.header.holds
    keys.take("context_length")  # its positions are distances
    keys.take(RMS)  # the same as the other
    if keys.take("attention.value_length", size := keys.require("attention.key_length")) != size:
        raise keys.refuse("attention.value_length")
    layers = keys.require("block_count")
    return {
        "model_type": "umt5" if holds("enc.blk.1.attn_rel_b.weight") else "t5",
        "d_model": keys.require("embedding_length"),
        "d_kv": size,
        "d_ff": keys.require("feed_forward_length"),
        "num_layers": layers,
        "num_decoder_layers": keys.take("decoder_block_count", layers),
        "num_heads": keys.require("attention.head_count"),
        "relative_attention_num_buckets": keys.require("attention.relative_buckets_count"),
        "layer_norm_epsilon": keys.require(NORM),
        "feed_forward_proj": "gated-gelu" if holds("ffn_gate.weight") else "relu",
        "decoder_start_token_id": keys.take("decoder_start_token_id", 0),
    }


_BUILDERS: dict[str, Callable[[Keys], dict[str, Any]]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen2moe": _qwen2moe, "qwen3": _qwen3, "qwen3moe": _qwen3moe,
    "gemma2": _gemma2, "gemma3": _gemma3, "phi3": _phi3, "smollm3": _smollm3, "granite": _granite, "olmo2": _olmo2,
    "starcoder2": _starcoder2, "stablelm": _stablelm,
    "nemotron": _nemotron, "falcon": _falcon, "bloom": _bloom, "gpt2": _gpt2, "mamba": _mamba, "t5": _t5,
}  # fmt: skip

UNKNOWN_TO_TRANSFORMERS = ("smollm3", "granite", "olmo2")  # as files
# Architectures whose files transformers reads by itself, tensors and config, and the keys that it takes over.
_MIXED = (
    "context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
    "attention.head_count_kv", RMS, "rope.freq_base",
)  # fmt: skip
_QWEN35 = (
    *_MIXED, "attention.key_length", "full_attention_interval", "ssm.conv_kernel", "ssm.state_size", "ssm.group_count",
    "ssm.time_step_rank", "ssm.inner_size", "rope.dimension_sections", "rope.dimension_count", "nextn_predict_layers",
)  # fmt: skip
READ_BY_TRANSFORMERS = {
    "lfm2": (*_MIXED, "shortconv.l_cache"),
    "qwen35": _QWEN35,
    "qwen35moe": (
        *_QWEN35, "expert_count", "expert_used_count", "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
    ),
}  # fmt: skip


def _by_transformers(header: GgufHeader) -> Any:
    keys = Keys(header)
    keys.refuse_layers_without_tensors()
    for key in READ_BY_TRANSFORMERS[header.architecture]:
        keys.take(key)
    if keys.take("attention.value_length", size := keys.take("attention.key_length")) != size:
        raise keys.refuse("attention.value_length")
    keys.refuse_others()
    return call_library(
        transformers.AutoConfig.from_pretrained, no_model(header.name), header.path.parent, trust_remote_code=False,
        gguf_file=header.path.name,
    )  # fmt: skip
