"""Tiny random models of real architectures, built from transformers' configs; same seed, same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from veneer.frozen.experts import QuantisedStack
from veneer.frozen.weight import QuantisedLinear

VOCABULARY = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}


def _llama(**more: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED, **more))


def _gpt2() -> nn.Module:
    config = tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    return tf.GPT2LMHeadModel(config)


def _opt() -> nn.Module:
    config = tf.OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32)
    return tf.OPTForCausalLM(config)


def _t5() -> nn.Module:
    # The factor brings its logits to the size of the others; T5 is initialised for training at huge learning rates.
    config = tf.T5Config(
        initializer_factor=0.5,
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _llama(tie_word_embeddings=False, attention_bias=True),
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=16)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GROUPED)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_GROUPED, head_dim=8)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_SIZES)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GROUPED, partial_rotary_factor=0.5)),
    "gpt2": _gpt2,
    "gptneox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES)),
    "opt": _opt,
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_SIZES, num_labels=3)),
    "t5": _t5,
}
# Models whose weights several modules hold: an encoder's embedding, a decoder's and a head; a head's two biases.
_BOTH = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
TIED: dict[str, Callable[[], nn.Module]] = {
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BOTH, scale_embedding=True)),
    "mbart": lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**_BOTH)),
    "m2m100": lambda: tf.M2M100ForConditionalGeneration(tf.M2M100Config(**_BOTH)),
    "pegasus": lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**_BOTH)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**_BOTH, decoder_vocab_size=VOCABULARY)),
    "umt5": lambda: tf.UMT5ForConditionalGeneration(
        tf.UMT5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0,
            decoder_start_token_id=0, initializer_factor=0.5,
        )
    ),
    "bert-mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**_SIZES)),
}  # fmt: skip
# Mixtures of experts, whose checkpoints have the experts one by one.
_EXPERTS = {"num_experts_per_tok": 2, **_GROUPED}
MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(num_experts=4, eos_token_id=1, **_EXPERTS)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(num_local_experts=4, **_EXPERTS)),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(num_experts=4, moe_intermediate_size=48, head_dim=8, **_EXPERTS)
    ),
    "gpt-oss": lambda: tf.GptOssForCausalLM(  # weights the other way round, biases, a gate of its own
        tf.GptOssConfig(num_local_experts=4, head_dim=8, sliding_window=8, **_EXPERTS)
    ),
}


def llama_folder(folder: Path, tokenizer: Any, *, layers: int = 2, positions: int = 128) -> None:
    """A tiny Llama for the tokens of ``tokenizer``, and it, as a transformers folder; the random state is left."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build(name: str, seed: int = 0) -> Any:
    """A tiny model in eval mode; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (ARCHITECTURES | TIED | MIXTURES)[name]().eval()
        # Fresh heads and norms are too regular (zero biases, ones): a mistake there would not show.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # Marian's constant positions do not, and are in no checkpoint
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def expanded(coded: nn.Module, plain: Any) -> Any:
    """``plain`` with the values that the codes of ``coded`` stand for."""
    with torch.no_grad():
        for name, module in coded.named_modules():
            if isinstance(module, QuantisedLinear):
                plain.get_submodule(name).weight.copy_(module.frozen().dense())
            if isinstance(module, QuantisedStack):
                path, _, projection = name.rpartition(".")
                getattr(plain.get_submodule(path), projection).copy_(module.dense())
    return plain


def batch(name: str, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Inputs and labels that fit the architecture."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    if name == "bert":
        return {"input_ids": tokens, "labels": torch.arange(rows) % 3}
    return {"input_ids": tokens, "labels": tokens.clone()}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits, without gradients."""
    with torch.no_grad():
        return model(**inputs).logits


def train_steps(model: Any, inputs: dict[str, Tensor], steps: int = 3, lr: float = 0.02) -> float:
    """A few steps of AdamW on one batch; the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    model.eval()
    return float(loss.detach())


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of the model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether the model has exactly the tensors of ``before``, bit for bit."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
