"""A model of Llama's kind, made ready to generate: a prompt by its own forward pass, then a token at a time by the C++
kernels. For a small model, what Python does between the layers takes longer than the layers."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from veneer.device import CPU
from veneer.frozen.exact import exact_value
from veneer.frozen.layers import gives_in_a_type
from veneer.frozen.weight import QuantisedLinear, StoredLinear
from veneer.generation.lane import Continuation, by_adapters
from veneer.generation.sampling import draw
from veneer.kernels import decode
from veneer.kernels.coded import CodedWeight, EightBits, Levels
from veneer.kernels.operations.products_int8 import GROUP, rows_in_8_bits
from veneer.kernels.serving import cpu_kernels
from veneer.models.parts import NORMS, is_silu, name_of
from veneer.updates.layers import AdaptedLinear, Dora, LowRank
from veneer.updates.record import adapters_of, row_adapters
from veneer.updates.rows import Names

# Types whose forward pass is known. A subclass may do more.
_MODELS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_ATTENTION, _GATED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_SHORT = 16  # tokens of all prompts together, up to which steps are faster than the model's own pass over all at once
ROTATIONS_BY_LENGTH = ("dynamic", "longrope")  # rotations that are others when a sequence has grown


class Unsupported(Exception):
    """The model has a part that the decoder does not know."""


class Decoder:
    """``model``, which is not changed as long as this is used, and the keys and values of ``sequences`` sequences of up
    to ``room`` tokens each. ``adapters``: those that it must be able to compute, by default the active ones.

    A prompt is read in the type that the model computes in; each token after it is computed in fp32. Inside
    `int8_activations` the products are those in 8 bits, and so is the output head's. Raises Unsupported.
    """

    def __init__(self, model: Any, sequences: int, room: int, adapters: Names | None = None) -> None:
        kernels = cpu_kernels()
        if kernels is None:
            raise Unsupported("there are no C++ kernels")
        _refuse(model)
        self._model, self._kernels = model, kernels
        self._active = adapters_of(model).active
        self._parts: dict[Names, _Parts] = {}
        self._by_adapters: dict[Names, decode.Decoder] = {}
        self._lengths: list[int] = []
        config = model.config
        self._keys = torch.empty(len(model.model.layers), 0, config.num_key_value_heads, 0, _attention(model).head_dim)
        self._values = torch.empty_like(self._keys)
        self.know(adapters, room)
        self.reserve(sequences, room)

    def know(self, adapters: Names | None, room: int) -> None:
        """Raises Unsupported for adapters, or for sequences of ``room`` tokens, that it cannot compute."""
        names = self._active if adapters is None else adapters
        window = getattr(self._model.config, "sliding_window", None)
        if window is not None and room > window:
            raise Unsupported("attention over a window")
        if names not in self._parts:
            self._parts[names] = _parts(self._model, names)

    def reserve(self, sequences: int, room: int) -> None:
        """Have memory for so many sequences of so many tokens, at least; what is in it stays."""
        layers, had, heads, length, dim = self._keys.shape
        if sequences <= had and room <= length:
            return
        # By the double, so that sequences that join one after another are not copied each time.
        shape = layers, max(sequences, 2 * had) if sequences > had else had, heads, max(room, length), dim
        old, self._keys, self._values = (self._keys, self._values), torch.empty(shape), torch.empty(shape)
        for row, used in enumerate(self._lengths):
            for before, now in zip(old, (self._keys, self._values), strict=True):
                now[:, row, :, :used] = before[:, row, :, :used]
        self._lengths += [0] * (shape[1] - had)
        self._by_adapters.clear()  # their addresses are those of the old memory

    def read(
        self, prompts: list[list[int]], sequences: list[int] | None = None, adapters: Names | None = None
    ) -> Tensor:
        """Begin ``sequences``, by default the first ones, with a prompt's tokens each; logits (prompts, vocabulary) of
        what follows."""
        sequences = list(range(len(prompts))) if sequences is None else sequences
        for sequence in sequences:
            self._lengths[sequence] = 0
        if sum(map(len, prompts)) > _SHORT:
            return self._read_by_the_model(prompts, sequences, adapters)
        rows = [sequence for sequence, prompt in zip(sequences, prompts, strict=True) for _ in prompt]
        logits = self.step([token for prompt in prompts for token in prompt], rows, adapters)
        return logits[torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1]

    def _read_by_the_model(self, prompts: list[list[int]], sequences: list[int], adapters: Names | None) -> Tensor:
        width = max(map(len, prompts))
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        cache = DynamicCache()
        with self._with(self._model, adapters, len(prompts), width):
            logits: Tensor = self._model(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0),
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            ).logits[:, -1].float()  # fmt: skip
        for number, layer in enumerate(cache.layers):
            for row, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
                pad, length = width - len(prompt), len(prompt)
                self._keys[number, sequence, :, :length] = cast(Tensor, layer.keys)[row, :, pad:]
                self._values[number, sequence, :, :length] = cast(Tensor, layer.values)[row, :, pad:]
        for prompt, sequence in zip(prompts, sequences, strict=True):
            self._lengths[sequence] = len(prompt)
        return logits

    def step(self, tokens: list[int], sequences: list[int], adapters: Names | None = None) -> Tensor:
        """One token more in each of these ``sequences``, with these adapters, by default the active ones.

        Returns logits (tokens, vocabulary) of what follows, good until the next step with these adapters.
        """
        positions = []
        for sequence in sequences:
            positions.append(self._lengths[sequence])
            self._lengths[sequence] += 1
        embed = self._model.model.embed_tokens
        with self._with(embed, adapters, len(tokens), 1):
            x = embed(torch.tensor(tokens)).float()
        return self._of(adapters).step(x, torch.tensor(sequences), torch.tensor(positions))

    def _with(self, part: Any, adapters: Names | None, rows: int, width: int) -> AbstractContextManager[None]:
        """A pass through a part of the model with these adapters."""
        return nullcontext() if adapters in (None, self._active) else row_adapters(part, [adapters] * rows, width)

    def _of(self, adapters: Names | None) -> decode.Decoder:
        """The layers with these adapters, over the memory that all share."""
        names = self._active if adapters is None else adapters
        if names not in self._by_adapters:
            self.know(names, room := self._keys.shape[3])
            model, (layers, norm, head) = self._model, self._parts[names]
            x = torch.empty(1, 1)  # for its type and device
            cosines, sines = (table[0].contiguous() for table in model.model.rotary_emb(x, torch.arange(room)[None]))
            attention = _attention(model)
            self._by_adapters[names] = decode.Decoder(
                self._kernels, layers, norm, head, heads=model.config.num_attention_heads,
                key_heads=model.config.num_key_value_heads, dim=attention.head_dim, scaling=attention.scaling,
                eps=model.model.norm.variance_epsilon, cosines=cosines, sines=sines, keys=self._keys,
                values=self._values,
            )  # fmt: skip
        return self._by_adapters[names]


class DecoderLane:
    """Sequences that the C++ kernels go on with: one call a step for all that have the same adapters."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoder: Decoder | None = None  # while there is a sequence
        self._pending: list[Continuation] = []
        self._places: dict[int, int] = {}  # key → the sequence of the decoder
        self._live: list[Continuation] = []
        self._room = 0

    def add(self, continuation: Continuation) -> None:
        """Raises Unsupported, with nothing taken over."""
        room = len(continuation.prompt) + continuation.limit
        if self._decoder is None:
            self._decoder = Decoder(self._model, 0, 0, continuation.adapters)
        self._decoder.know(continuation.adapters, room)
        self._pending.append(continuation)
        self._room = max(self._room, room)

    def step(self) -> list[tuple[Continuation, int]]:
        added: list[tuple[Continuation, int]] = []
        decoder = self._decoder
        if decoder is None:
            return []
        for adapters, members in by_adapters(self._live).items():
            places = [self._places[member.key] for member in members]
            logits = decoder.step([member.tokens[-1] for member in members], places, adapters)
            added += zip(members, draw(logits, [member.sampler for member in members]), strict=True)
        decoder.reserve(len(self._live) + len(self._pending), self._room)
        for adapters, members in by_adapters(self._pending).items():
            places = [self._take_place(member) for member in members]
            logits = decoder.read([member.prompt for member in members], places, adapters)
            added += zip(members, draw(logits, [member.sampler for member in members]), strict=True)
        self._live, self._pending = [*self._live, *self._pending], []
        return added

    def drop(self, continuations: list[Continuation]) -> None:
        gone = {continuation.key for continuation in continuations}
        self._pending = [one for one in self._pending if one.key not in gone]
        self._live = [one for one in self._live if one.key not in gone]
        self._places = {key: place for key, place in self._places.items() if key not in gone}
        if not self._live and not self._pending:
            self._decoder, self._room = None, 0

    def _take_place(self, continuation: Continuation) -> int:
        taken = set(self._places.values())
        self._places[continuation.key] = next(place for place in count() if place not in taken)
        return self._places[continuation.key]


def generates_by(model: Any) -> str:
    """The C++ kernels, or transformers and why, in a few words."""
    try:
        Decoder(model, 1, 1)
    except Unsupported as reason:
        return f"transformers ({reason})"
    return "the C++ kernels"


class _Parts(NamedTuple):
    layers: list[decode.Layer]
    norm: Tensor
    head: decode.Linear


def _parts(model: Any, adapters: Names) -> _Parts:
    """What the extension multiplies by. Raises Unsupported where that is not all that the model does."""
    in_8_bits = any(isinstance(part, QuantisedLinear) and part.few_rows for part in model.modules())
    layers = [_layer(layer, adapters) for layer in model.model.layers]
    return _Parts(layers, _norm(model.model.norm), _head(model.lm_head, adapters, in_8_bits))


def _attention(model: Any) -> Any:
    return model.model.layers[0].self_attn


def _refuse(model: Any) -> None:
    if type(model) not in _MODELS or model.training or model.device.type != CPU:
        raise Unsupported("another kind of model, or on another device")
    if model.config.rope_parameters["rope_type"] in ROTATIONS_BY_LENGTH:
        raise Unsupported("rotations that change with the length")
    if not decode.takes_heads_of(_attention(model).head_dim):
        raise Unsupported("heads of another size")
    if not all(is_silu(layer.mlp.act_fn) for layer in model.model.layers):
        raise Unsupported("another gate")
    if any(_others_hooks(part) or "forward" in part.__dict__ for part in model.modules()):
        raise Unsupported("somebody's hook")


def _others_hooks(part: nn.Module) -> bool:
    return bool(part._forward_pre_hooks) or not all(map(gives_in_a_type, part._forward_hooks.values()))


def _layer(layer: Any, adapters: Names) -> decode.Layer:
    attention = layer.self_attn
    per_head = [_norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
    linears = [getattr(attention, name) for name in _ATTENTION] + [getattr(layer.mlp, name) for name in _GATED]
    return decode.Layer(
        (_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm), per_head[0], per_head[1]),
        tuple(_linear(linear, adapters) for linear in linears),
    )


def _norm(norm: Any) -> Tensor:
    if name_of(norm) not in NORMS:
        raise Unsupported(f"a {type(norm).__name__}")
    return _fp32(exact_value(norm, "weight"))


def _linear(module: nn.Module, adapters: Names) -> decode.Linear:
    updates = module.in_force(adapters) if isinstance(module, AdaptedLinear) else []
    base: Any = module.base if isinstance(module, AdaptedLinear) else module
    if not all(isinstance(update, LowRank) for update in updates):
        raise Unsupported("trained rows of the vocabulary")
    if any(isinstance(update, Dora) for update in updates):
        raise Unsupported("magnitudes of outputs")
    low_rank = [(*update.matrices(), update.scale) for update in updates if isinstance(update, LowRank) and update.rank]
    weight: Tensor | CodedWeight
    levels: Levels | None = None
    if isinstance(base, QuantisedLinear):
        weight = base.quantised.coded
        levels = base.quantised.levels if base.few_rows is not None else None
    elif type(base) in (nn.Linear, StoredLinear):
        weight = _fp32(base.weight)
    else:
        raise Unsupported(f"a {type(base).__name__}")
    bias = None if base.bias is None else _fp32(exact_value(base, "bias"))
    return decode.Linear(weight, bias, tuple((_fp32(A), _fp32(B), scale) for A, B, scale in low_rank), levels)


def _head(module: nn.Module, adapters: Names, in_8_bits: bool) -> decode.Linear:
    head = _linear(module, adapters)
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
