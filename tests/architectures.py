"""Tiny models of many of transformers' architectures: name → a model, its inputs, and which of its outputs counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_OLD = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": 64, "pad_token_id": 0}
_BOTH = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0,
}  # fmt: skip

# The prefix of transformers' classes, and the options of its config that make it tiny.
_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "llama-tied": ("Llama", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": ("Mistral", _GROUPED),
    "ministral": ("Ministral", _GROUPED),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", _GROUPED),
    "gemma": ("Gemma", _GROUPED),
    "gemma2": ("Gemma2", _GROUPED),
    "phi": ("Phi", _SIZES),
    "phi3": ("Phi3", {**_GROUPED, "partial_rotary_factor": 0.5}),
    "gptneox": ("GPTNeoX", _SIZES),
    "gptj": ("GPTJ", {**_OLD, "rotary_dim": 4}),
    "gptneo": ("GPTNeo", {**_SIZES, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}),
    "gpt2": ("GPT2", _OLD),
    "codegen": ("CodeGen", {**_OLD, "n_ctx": 64, "rotary_dim": 4}),
    "bigcode": ("GPTBigCode", _OLD),
    "openai-gpt": ("OpenAIGPT", _OLD),
    "ctrl": ("CTRL", {**_OLD, "dff": 48}),
    "opt": ("OPT", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4, "pad_token_id": 0}),
    "mpt": ("Mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64}),
    "falcon": ("Falcon", _SIZES),
    "falcon-new": ("Falcon", {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "olmo": ("Olmo", _GROUPED),
    "olmo2": ("Olmo2", _GROUPED),
    "olmo3": ("Olmo3", _GROUPED),
    "granite": ("Granite", _GROUPED),
    "stablelm": ("StableLm", _GROUPED),
    "starcoder2": ("Starcoder2", _GROUPED),
    "cohere": ("Cohere", _GROUPED),
    "cohere2": ("Cohere2", _GROUPED),
    "helium": ("Helium", _GROUPED),
    "glm": ("Glm", _GROUPED),
    "glm4": ("Glm4", _GROUPED),
    "nemotron": ("Nemotron", _GROUPED),
    "persimmon": ("Persimmon", _SIZES),
    "smollm3": ("SmolLM3", _GROUPED),
    "ernie4.5": ("Ernie4_5", _GROUPED),
    "exaone4": ("Exaone4", _GROUPED),
    "seed-oss": ("SeedOss", _GROUPED),
    "arcee": ("Arcee", _GROUPED),
    "apertus": ("Apertus", _GROUPED),
    "lfm2": ("Lfm2", {**_GROUPED, "layer_types": ["full_attention"]}),
    "recurrentgemma": ("RecurrentGemma", {
        **_GROUPED, "num_hidden_layers": 2, "lru_width": 32, "block_types": ["recurrent", "attention"],
    }),
    "diffllama": ("DiffLlama", _GROUPED),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3-moe": ("Qwen3Moe", {**_EXPERTS, "num_experts": 4}),
    "olmoe": ("Olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite-moe": ("GraniteMoe", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("Phimoe", {**_GROUPED, "num_local_experts": 4}),
    "gpt-oss": ("GptOss", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v3": ("DeepseekV3", {
        **_SIZES, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "n_group": 2, "topk_group": 1,
    }),
    "mamba": ("Mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}),
    "falcon-mamba": ("FalconMamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}),
    "mamba2": ("Mamba2", {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "num_heads": 4, "head_dim": 16,
        "n_groups": 2,
    }),
    "jamba": ("Jamba", {
        **_GROUPED, "num_hidden_layers": 2, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_d_state": 4,
    }),
    "xglm": ("XGLM", {"vocab_size": 64, "d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4}),
    "biogpt": ("BioGpt", _SIZES),
}  # fmt: skip
_MASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _SIZES),
    "roberta": ("Roberta", _SIZES),
    "electra": ("Electra", {**_SIZES, "embedding_size": 16}),
    "albert": ("Albert", {**_SIZES, "embedding_size": 16}),
    "deberta": ("Deberta", _SIZES),
    "deberta-v2": ("DebertaV2", _SIZES),
    "modernbert": ("ModernBert", {**_SIZES, "cls_token_id": 1, "sep_token_id": 2}),
    "distilbert": ("DistilBert", {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4}),
    "xlm-roberta": ("XLMRoberta", _SIZES),
    "camembert": ("Camembert", _SIZES),
    "mpnet": ("MPNet", _SIZES),
}
_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
_PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
                  "pad_token_id": 0, "decoder_start_token_id": 0}),
    "bart": ("Bart", _BOTH),
    "bart-scaled": ("Bart", {**_BOTH, "scale_embedding": True}),
    "mbart": ("MBart", _BOTH),
    "m2m100": ("M2M100", _BOTH),
    "pegasus": ("Pegasus", _BOTH),
    "blenderbot": ("Blenderbot", _BOTH),
    "plbart": ("PLBart", _BOTH),
}  # fmt: skip


def _tokens() -> Tensor:
    return torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))


def _noisy(made: Callable[[], Any]) -> Any:
    """A model in eval mode without regular weights; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def _by_name(prefix: str, task: str, options: dict[str, Any]) -> Any:
    config = getattr(tf, f"{prefix}Config")(**options)
    return _noisy(lambda: getattr(tf, f"{prefix}{task}")(config))


def _vision(name: str) -> tuple[Any, dict[str, Tensor]]:
    part = {key: value for key, value in _SIZES.items() if not key.endswith("_id")}
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if name == "vit":
        config = tf.ViTConfig(**part, image_size=8, patch_size=4)
        return _noisy(lambda: tf.ViTForImageClassification(config)), {"pixel_values": image}
    text, vision = {**_SIZES, "projection_dim": 16}, {**part, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return _noisy(lambda: tf.CLIPModel(config)), {"input_ids": _tokens(), "pixel_values": image}


def _sound(name: str) -> tuple[Any, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    if name == "whisper":
        config = tf.WhisperConfig(**_BOTH, num_mel_bins=4, max_source_positions=8, max_target_positions=16)
        inputs = {"input_features": torch.randn(2, 4, 16, generator=generator), "decoder_input_ids": _tokens()}
        return _noisy(lambda: tf.WhisperForConditionalGeneration(config)), inputs
    config = tf.Wav2Vec2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, conv_dim=(16,),
        conv_kernel=(3,), conv_stride=(2,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    inputs = {"input_values": torch.randn(2, 40, generator=generator)}
    return _noisy(lambda: tf.Wav2Vec2ForCTC(config)), inputs


class Encoder(nn.Module):
    """A model of torch's own encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0), 1)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.encoder(x),)


NAMES = (
    *_CAUSAL, *(f"{name} {task.removeprefix('For')}" for name in ("bert", "roberta") for task in _TASKS),
    *(name for name in _MASKED if name not in ("bert", "roberta")), *_PAIRS,
    "vit", "clip", "whisper", "wav2vec2", "torch",
)  # fmt: skip


def made(name: str) -> tuple[Any, dict[str, Tensor]]:
    """The model and its inputs."""
    first, _, task = name.partition(" ")
    if name in _CAUSAL:
        prefix, options = _CAUSAL[name]
        head = "LMHeadModel" if prefix in ("GPT2", "OpenAIGPT", "CTRL") else "ForCausalLM"
        return _by_name(prefix, head, options), {"input_ids": _tokens()}
    if first in _MASKED:
        prefix, options = _MASKED[first]
        return _by_name(prefix, f"For{task or 'MaskedLM'}", options), {"input_ids": _tokens()}
    if name in _PAIRS:
        prefix, options = _PAIRS[name]
        model = _by_name(prefix, "ForConditionalGeneration", options)
        return model, {"input_ids": _tokens(), "decoder_input_ids": _tokens()[:, :4]}
    if name == "torch":
        return _noisy(Encoder), {"x": torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))}
    return _vision(name) if name in ("vit", "clip") else _sound(name)


def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the model computes: its logits, or its first output."""
    out = model(**inputs)
    logits = getattr(out, "logits", None)
    if logits is None:
        logits = getattr(out, "logits_per_image", None)
    return logits if isinstance(logits, Tensor) else out[0]
