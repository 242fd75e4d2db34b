"""Tiny models that take images or sound beside text, built from transformers' configs; the tokenizer's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from tokens import tokenizer

_WORDS = len(tokenizer())
_TEXT: dict[str, Any] = {
    "vocab_size": _WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 14,
    "image_size": 28,
}  # fmt: skip
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
_BY_SECTION = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_IMAGE = _WORDS - 1


def _gemma3() -> Any:
    text = {**_TEXT, "head_dim": 8, "sliding_window": 16}
    ids = {"image_token_index": _IMAGE, "boi_token_index": _IMAGE - 1, "eoi_token_index": _IMAGE - 2}
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=1, **ids)
    )


def _mistral3() -> Any:
    text = {**_TEXT, "model_type": "mistral", "head_dim": 8}
    vision = {**_VISION, "model_type": "pixtral"}
    return tf.Mistral3ForConditionalGeneration(
        tf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=_IMAGE)
    )


def _qwen2_5_vl() -> Any:
    text = {**_TEXT, "rope_parameters": _BY_SECTION}
    config = tf.Qwen2_5_VLConfig(
        text_config=text, vision_config=_QWEN_VISION, image_token_id=_IMAGE, video_token_id=_IMAGE
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    text = {**_TEXT, "head_dim": 8, "rope_parameters": {**_BY_SECTION, "mrope_interleaved": True}}
    vision = {**_QWEN_VISION, "deepstack_visual_indexes": [0]}
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=_IMAGE, video_token_id=_IMAGE)
    return tf.Qwen3VLForConditionalGeneration(config)


def _llava() -> Any:
    text, vision = {**_TEXT, "model_type": "llama"}, {**_VISION, "model_type": "clip_vision_model"}
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=_IMAGE)
    return tf.LlavaForConditionalGeneration(config)


def _smolvlm() -> Any:
    text = {**_TEXT, "model_type": "llama"}
    config = tf.SmolVLMConfig(text_config=text, vision_config=_VISION, image_token_id=_IMAGE, pad_token_id=None)
    return tf.SmolVLMForConditionalGeneration(config)


def _paligemma() -> Any:
    text, vision = {**_TEXT, "model_type": "gemma", "head_dim": 8}, {**_VISION, "model_type": "siglip_vision_model"}
    config = tf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_index=_IMAGE)
    return tf.PaliGemmaForConditionalGeneration(config)


def _qwen2_audio() -> Any:
    audio = {
        "d_model": 16, "encoder_ffn_dim": 24, "encoder_attention_heads": 2, "encoder_layers": 1, "num_mel_bins": 8,
        "max_source_positions": 16,
    }  # fmt: skip
    text = {**_TEXT, "model_type": "qwen2"}
    config = tf.Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=_IMAGE)
    return tf.Qwen2AudioForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "gemma3": _gemma3, "mistral3": _mistral3, "qwen2_5_vl": _qwen2_5_vl, "llava": _llava, "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm, "paligemma": _paligemma, "qwen2_audio": _qwen2_audio,
}  # fmt: skip


def build(name: str, seed: int = 0) -> Any:
    """A tiny model in eval mode, no parameter of which is regular."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
