"""A GGUF file's keys, each taken over or refused by name: one that nobody asked for would change the model in
silence."""

from __future__ import annotations

import re
from typing import Any

from veneer.errors import ModelError
from veneer.models.gguf_header import GgufHeader
from veneer.models.library import some_of

# Names, licences and dates; the tokenizer, which transformers reads; remarks of those who quantised the file.
_REMARKS = re.compile(r"(GGUF|general|tokenizer|quantize|mradermacher)\.")
# Keys that say nothing of the function that the model computes.
_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type")
# Keys that may only say what every model of the architectures that are read does.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "attention.clamp_kqv": (0.0,),
    "attention.sliding_window": (0,),
    "nextn_predict_layers": (0,),
    "leading_dense_block_count": (0,),
}
_BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.(\d+)\.")
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


class Keys:
    """The keys of ``header`` for its architecture, without "llama." and the like before them.

    `take` gives a key's value. `refuse_others` raises ModelError for what nobody has taken, of keys and of the tensors
    that belong into a config (`tensor`).
    """

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self._prefix = f"{header.architecture}."
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        self._taken.add(self._prefix + key)
        return self.header.metadata.get(self._prefix + key, default)

    def assume(self, key: str, value: Any) -> None:
        """What a key says in a file that lacks it."""
        self.header.metadata[self._prefix + key] = value

    def require(self, key: str) -> Any:
        """A key that no file lacks, with one value for all layers."""
        value = self.take(key)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise ModelError(
                f"{self.header.name} says that {self._prefix}{key} differs from layer to layer, which its model in "
                f"transformers cannot have."
            )
        if value is None:
            raise ModelError(f"{self.header.name} lacks {self._prefix}{key}; it is incomplete.")
        return value

    def tensor(self, name: str) -> list[float] | None:
        """The values of a tensor that belongs into the config, where the file has it."""
        self._taken.add(name)
        return self.header.expand(name).ravel().tolist() if name in self.header.tensors else None

    def refuse(self, key: str) -> ModelError:
        """What a key is refused with whose value the model in transformers cannot have."""
        name = self._prefix + key
        return ModelError(
            f"{self.header.name} says {name} = {self.header.metadata.get(name)!r}, which Veneer does not know how to "
            f"use for this architecture; load the model that the file was made of."
        )

    def refuse_layers_without_tensors(self) -> None:
        """Raises ModelError where the file says more layers than it holds tensors of."""
        layers = self.header.metadata.get(f"{self._prefix}block_count")
        held = {found.group(1) for name in self.header.tensors if (found := _BLOCK.match(name))}
        if isinstance(layers, int) and layers > len(held):
            raise ModelError(
                f"{self.header.name} says that it has {layers:,} layers, and holds tensors of {len(held)}; it is "
                f"damaged, or a part of a model."
            )

    def refuse_others(self) -> None:
        for key, values in _FIXED.items():
            if self._prefix + key not in self._taken and self.take(key, values[0]) not in values:
                raise self.refuse(key)
        self._taken |= {self._prefix + key for key in _HARMLESS}
        metadata = self.header.metadata
        if metadata.get("split.count", 1) > 1:
            raise ModelError(
                f"{self.header.name} is one of {metadata['split.count']} files of a model; join them first, with "
                f"llama-gguf-split --merge."
            )
        if metadata.get("general.type", "model") != "model":
            raise ModelError(f"{self.header.name} is no model: its general.type is {metadata['general.type']!r}.")
        others = [
            name
            for name in (*metadata, *(tensor for tensor in ROPE_TENSORS if tensor in self.header.tensors))
            if name not in self._taken and not _REMARKS.match(name) and not name.startswith("split.")
        ]
        if others:
            raise ModelError(
                f"{self.header.name} holds {some_of(others)}, which Veneer does not know how to use for the "
                f"architecture {self.header.architecture}; load the model that the file was made of."
            )
