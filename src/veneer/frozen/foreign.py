"""Linear layers that another library keeps in codes."""

from __future__ import annotations

from torch import nn


def of_bitsandbytes(module: nn.Module) -> bool:
    """Whether bitsandbytes keeps a linear layer, in a model that transformers quantised by it."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")


def is_8_bits(module: nn.Module) -> bool:
    """Whether such a layer is one of bitsandbytes' 8 bits, which are another format than Veneer's."""
    return type(module).__name__.startswith("Linear8")


def how_to_move(module: nn.Module) -> str:
    """The rest of a sentence about such a layer: how it comes into Veneer's storage."""
    if is_8_bits(module):
        return ' in 8 bits, another format than Veneer\'s; load the model by veneer.load(…, storage="int8") instead.'
    return "; veneer.from_bitsandbytes(model) first moves such layers into Veneer's storage, with the same codes."
