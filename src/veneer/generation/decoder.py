"""A model of Llama's kind, made ready to generate: a prompt by its own forward pass, then a token at a time by the C++
kernels. For a small model, what Python does between the layers takes longer than the layers."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from veneer.device import CPU
from veneer.frozen.weight import QuantisedLinear
from veneer.kernels import decode
from veneer.kernels.coded import CodedWeight, EightBits, Levels
from veneer.kernels.operations.products_int8 import GROUP, rows_in_8_bits
from veneer.kernels.serving import cpu_kernels
from veneer.models.parts import NORMS, is_silu, name_of
from veneer.updates.layers import AdaptedLinear, LowRank

# Types whose forward pass is known. A subclass may do more.
_MODELS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_ATTENTION, _GATED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_SHORT = 16  # tokens of all prompts together, up to which steps are faster than the model's own pass over all at once
_LENGTHS = ("dynamic", "longrope")  # rotations that are others when a sequence has grown


class Unsupported(Exception):
    """The model has a part that the decoder does not know."""


class Decoder:
    """``model``, which is not changed as long as this is used, and the keys and values of ``sequences`` sequences of up
    to ``room`` tokens each.

    Inside `int8_activations` the products are those in 8 bits, and so is the output head's. Raises Unsupported.
    """

    def __init__(self, model: Any, sequences: int, room: int) -> None:
        _refuse(model, room)
        kernels = cpu_kernels()
        if kernels is None:
            raise Unsupported("there are no C++ kernels")
        layers = list(model.model.layers)
        in_8_bits = any(isinstance(part, QuantisedLinear) and part.few_rows for part in model.modules())
        attention = layers[0].self_attn
        x = torch.empty(1, 1)  # for its type and device
        cosines, sines = (table[0].contiguous() for table in model.model.rotary_emb(x, torch.arange(room)[None]))
        self._model = model
        self._lengths = [0] * sequences
        self._decoder = decode.Decoder(
            kernels, [_layer(layer) for layer in layers], _norm(model.model.norm), _head(model.lm_head, in_8_bits),
            heads=model.config.num_attention_heads, key_heads=model.config.num_key_value_heads, dim=attention.head_dim,
            scaling=attention.scaling, eps=model.model.norm.variance_epsilon, cosines=cosines, sines=sines,
            sequences=sequences,
        )  # fmt: skip

    def read(self, prompts: list[list[int]]) -> Tensor:
        """The tokens of each sequence's prompt; logits (sequences, vocabulary) of what follows."""
        self._lengths = [0] * len(prompts)
        if sum(map(len, prompts)) > _SHORT:
            return self._read_by_the_model(prompts)
        sequences = [row for row, prompt in enumerate(prompts) for _ in prompt]
        logits = self.step([token for prompt in prompts for token in prompt], sequences)
        last = [sequences.index(row) + len(prompt) - 1 for row, prompt in enumerate(prompts)]
        return logits[last]

    def _read_by_the_model(self, prompts: list[list[int]]) -> Tensor:
        width = max(map(len, prompts))
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        cache = DynamicCache()
        logits: Tensor = self._model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        for number, layer in enumerate(cache.layers):
            for row, prompt in enumerate(prompts):
                pad, length = width - len(prompt), len(prompt)
                self._decoder.keys[number, row, :, :length] = cast(Tensor, layer.keys)[row, :, pad:]
                self._decoder.values[number, row, :, :length] = cast(Tensor, layer.values)[row, :, pad:]
        self._lengths = [len(prompt) for prompt in prompts]
        return logits

    def step(self, tokens: list[int], sequences: list[int]) -> Tensor:
        """One token more in each of these ``sequences``; logits (tokens, vocabulary) of what follows."""
        positions = []
        for sequence in sequences:
            positions.append(self._lengths[sequence])
            self._lengths[sequence] += 1
        x = self._model.model.embed_tokens(torch.tensor(tokens))
        return self._decoder.step(x, torch.tensor(sequences), torch.tensor(positions))


def generates_by(model: Any) -> str:
    """The C++ kernels, or transformers and why, in a few words."""
    try:
        Decoder(model, 1, 1)
    except Unsupported as reason:
        return f"transformers ({reason})"
    return "the C++ kernels"


def _refuse(model: Any, room: int) -> None:
    if type(model) not in _MODELS or model.training or model.device.type != CPU:
        raise Unsupported("another kind of model, or on another device")
    config = model.config
    if getattr(config, "sliding_window", None) is not None and room > config.sliding_window:
        raise Unsupported("attention over a window")
    if config.rope_parameters["rope_type"] in _LENGTHS:
        raise Unsupported("rotations that change with the length")
    if not decode.takes_heads_of(model.model.layers[0].self_attn.head_dim):
        raise Unsupported("heads of another size")
    if not all(is_silu(layer.mlp.act_fn) for layer in model.model.layers):
        raise Unsupported("another gate")
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in model.modules()):
        raise Unsupported("somebody's hook")


def _layer(layer: Any) -> decode.Layer:
    attention = layer.self_attn
    per_head = [_norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
    linears = [getattr(attention, name) for name in _ATTENTION] + [getattr(layer.mlp, name) for name in _GATED]
    return decode.Layer(
        (_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm), per_head[0], per_head[1]),
        tuple(map(_linear, linears)),
    )


def _norm(norm: Any) -> Tensor:
    if name_of(norm) not in NORMS:
        raise Unsupported(f"a {type(norm).__name__}")
    return _fp32(norm.weight)


def _linear(module: nn.Module) -> decode.Linear:
    updates = module.in_force() if isinstance(module, AdaptedLinear) else []
    base: Any = module.base if isinstance(module, AdaptedLinear) else module
    if not all(isinstance(update, LowRank) for update in updates):
        raise Unsupported("trained rows of the vocabulary")
    low_rank = [(*update.matrices(), update.scale) for update in updates if isinstance(update, LowRank) and update.rank]
    weight: Tensor | CodedWeight
    levels: Levels | None = None
    if isinstance(base, QuantisedLinear):
        weight = base.quantised.coded
        levels = base.quantised.levels if base.few_rows is not None else None
    elif type(base) is nn.Linear:
        weight = _fp32(base.weight)
    else:
        raise Unsupported(f"a {type(base).__name__}")
    bias = None if base.bias is None else _fp32(base.bias)
    return decode.Linear(weight, bias, tuple((_fp32(A), _fp32(B), scale) for A, B, scale in low_rank), levels)


def _head(module: nn.Module, in_8_bits: bool) -> decode.Linear:
    head = _linear(module)
    if in_8_bits and isinstance(head.weight, Tensor) and head.weight.shape[1] % GROUP == 0:
        return head._replace(weight=_rounded(cast(Tensor, getattr(module, "base", module).weight)))
    return head


_rounded_heads: dict[int, tuple[int, EightBits]] = {}  # by the weight's id, as long as it lives


def _rounded(weight: Tensor) -> EightBits:
    """A head's weight in 8 bits, remembered: to round it takes as long as a good many steps."""
    key = id(weight)
    if key not in _rounded_heads:
        weakref.finalize(weight, _rounded_heads.pop, key, None)
    if key not in _rounded_heads or _rounded_heads[key][0] != weight._version:
        _rounded_heads[key] = weight._version, rows_in_8_bits(weight.detach())
    return _rounded_heads[key][1]


def _fp32(tensor: Tensor) -> Tensor:
    if tensor.dtype is not torch.float32:
        raise Unsupported(f"{tensor.dtype}")
    return tensor.detach().contiguous()
