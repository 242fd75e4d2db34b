"""What a GGUF file says by its keys, and what transformers' configs call it: one table, which reading (`gguf_config`)
and writing (`gguf_description`) both go by."""

from __future__ import annotations

RMS, NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"

# Keys of nearly all decoders.
DECODER = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
# The field of the norms' epsilon, and its key, where they are not rms_norm_eps and RMS.
NORMS = {"starcoder2": (NORM, "norm_epsilon"), "gpt2": (NORM, "layer_norm_epsilon")}
GPT2 = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
}
# What Granite multiplies by: its values, and what llama.cpp takes where a key is missing.
GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
CAPS = {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}
YARN = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}

# The layers of Gemma's 27B models, whose queries llama.cpp scales by another rule, since no key says it.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
# How many layers follow each other of which the last one alone sees more than a window, where no key says it.
WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}
# How many follow each other of which the last one rotates no positions: a rule of llama.cpp's, without a key.
UNROTATED_PERIOD = {"smollm3": 4}

# The architectures that are written: transformers' model type → GGUF's name.
WRITTEN = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo2": "olmo2",
    "starcoder2": "starcoder2",
    "gpt2": "gpt2",
}
