"""Tiny models of the architectures that are read from GGUF files, with what each may have: rotation, window, biases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import transformers as tf

from tokens import tokenizer
from veneer.models.gguf_table import WRITTEN

TOKENIZER = tokenizer(merges=(("h", "e"), ("l", "l")))
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 96, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}  # not hidden_size / heads
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 24}
ROPE = {"rope_type": "default", "rope_theta": 30000.0}
T5: dict[str, Any] = {
    "vocab_size": len(TOKENIZER), "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
QWEN35: dict[str, Any] = {
    **WIDE, "num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}


def llama(**more: Any) -> Any:
    return of("llama", **{**GROUPED, **more})


def of(kind: str, **more: Any) -> Any:
    """A model of ``kind``, transformers' name for it."""
    made = tf.AutoModelForSeq2SeqLM if kind in ("t5", "umt5") else tf.AutoModelForCausalLM
    return made.from_config(tf.AutoConfig.for_model(kind, **copy.deepcopy(more)))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, another head size": lambda: llama(head_dim=16),
    "llama, tied, biases": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama, all heads have keys": lambda: llama(num_key_value_heads=4),
    "llama, linear": lambda: llama(rope_parameters=LINEAR),
    "llama, yarn": lambda: llama(rope_parameters=YARN),
    "llama, yarn with all of its keys": lambda: llama(
        rope_parameters={**YARN, "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}
    ),
    "mistral": lambda: of("mistral", **GROUPED, sliding_window=None, rope_parameters=ROPE),
    "qwen2": lambda: of("qwen2", **GROUPED, rope_parameters=ROPE),
    "qwen2, yarn": lambda: of("qwen2", **GROUPED, rope_parameters=YARN),
    "qwen2 mixture": lambda: of(
        "qwen2_moe", **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40, rope_parameters=ROPE,
    ),
    "qwen3, heads not of 128": lambda: of("qwen3", **WIDE, rope_parameters=ROPE),
    "qwen3, yarn": lambda: of("qwen3", **WIDE, rope_parameters=YARN),
    "qwen3 mixture, not 768 wide": lambda: of(
        "qwen3_moe", **WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True,
        rope_parameters=ROPE,
    ),
    "gemma2": lambda: of("gemma2", **WIDE, query_pre_attn_scalar=16, sliding_window=20, rope_parameters=ROPE),
    "gemma2, other caps": lambda: of(
        "gemma2", **WIDE, query_pre_attn_scalar=16, sliding_window=20, attn_logit_softcapping=0.5,
        final_logit_softcapping=0.2,
    ),
    "gemma3": lambda: of(
        "gemma3_text", **{**WIDE, "num_hidden_layers": 7}, query_pre_attn_scalar=16, sliding_window=20
    ),
    "gemma3, linear": lambda: of(
        "gemma3_text", **{**WIDE, "num_hidden_layers": 7}, query_pre_attn_scalar=16, sliding_window=20,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gemma3, a cap": lambda: of(
        "gemma3_text", **WIDE, query_pre_attn_scalar=16, sliding_window=20, final_logit_softcapping=0.5
    ),
    "phi3": lambda: of("phi3", **GROUPED),
    "phi3, a part rotated, a window": lambda: of(
        "phi3", **GROUPED, sliding_window=20, rope_parameters={**ROPE, "partial_rotary_factor": 0.5}
    ),
    "phi3, longrope": lambda: of(
        "phi3", **GROUPED, original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
    ),
    "smollm3": lambda: of("smollm3", **{**GROUPED, "num_hidden_layers": 5}, rope_parameters=ROPE),
    "granite": lambda: of(
        "granite", **GROUPED, attention_multiplier=0.5, embedding_multiplier=12.0, residual_multiplier=0.22,
        logits_scaling=8.0, rope_parameters=ROPE,
    ),
    "olmo2": lambda: of("olmo2", **GROUPED, rope_parameters=ROPE),
    "starcoder2": lambda: of("starcoder2", **GROUPED, sliding_window=20, rope_parameters=ROPE),
    "starcoder2, no window, untied": lambda: of("starcoder2", **GROUPED, tie_word_embeddings=False),
    "stablelm": lambda: of("stablelm", **GROUPED),
    "stablelm, biases, parallel": lambda: of(
        "stablelm", **GROUPED, use_qkv_bias=True, use_parallel_residual=True,
        rope_parameters={**ROPE, "partial_rotary_factor": 0.5},
    ),
    "nemotron": lambda: of("nemotron", **GROUPED, norm_eps=1e-3),
    "nemotron, linear, another head size": lambda: of("nemotron", **WIDE, rope_parameters=LINEAR),
    "falcon 7B": lambda: of("falcon", **SIZES, num_kv_heads=1, rope_parameters=ROPE),
    "falcon 40B": lambda: of("falcon", **SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "falcon 11B": lambda: of(
        "falcon", **SIZES, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=80
    ),
    "bloom": lambda: of("bloom", vocab_size=len(TOKENIZER), hidden_size=32, n_layer=2, n_head=4),
    "gpt2, another context than 1024": lambda: of("gpt2", **GPT2, n_inner=80, layer_norm_epsilon=1e-3),
    "mamba": lambda: of(
        "mamba", vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, state_size=8, conv_kernel=3, expand=3
    ),
    "t5, gated, untied": lambda: of("t5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5, more layers in the decoder": lambda: of("t5", **T5, num_decoder_layers=3),
    "umt5": lambda: of("umt5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "lfm2": lambda: of(
        "lfm2", **GROUPED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, rope_parameters=ROPE
    ),
    "qwen35": lambda: of("qwen3_5_text", **QWEN35),
    "qwen35 mixture": lambda: of(
        "qwen3_5_moe_text", **QWEN35, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
}  # fmt: skip
WRITABLE = {name: make for name, make in MODELS.items() if make().config.model_type in WRITTEN}
