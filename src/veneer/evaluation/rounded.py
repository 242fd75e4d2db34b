"""A model whose weights are what a GGUF file keeps of them, to measure what rounding costs before the file is used."""

from __future__ import annotations

from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import nn

from veneer.models.gguf_header import GgufHeader
from veneer.models.gguf_write import Draft
from veneer.updates.merge import plain_module


class Rounded(nn.Module):
    """A module whose parameters are those that a file gives, expanded for each call and dropped after it.

    ``plain``: the module without values; ``keys``: its parameters → the plain model's names of them.
    """

    def __init__(self, plain: nn.Module, draft: Draft, header: GgufHeader, keys: dict[str, str]) -> None:
        super().__init__()
        self.plain, self._draft, self._header, self._keys = plain, draft, header, keys

    def forward(self, *arguments: Any, **options: Any) -> Any:
        its = {name: self._draft.read_again(self._header, key) for name, key in self._keys.items()}
        return torch.func.functional_call(self.plain, its, arguments, options)


def rounded_layers(model: nn.Module, draft: Draft, header: GgufHeader) -> dict[str, nn.Module]:
    """The modules of ``model``, adapted and quantised ones, too, whose weight the file of ``header`` rounds, by name,
    each as a `Rounded`."""
    found: dict[str, nn.Module] = {}
    for key, name in draft.places.items():
        path, _, last = key.rpartition(".")
        if last == "weight" and header.tensors[name].type != GGMLQuantizationType.F32:
            plain = plain_module(model.get_submodule(path))
            keys = {its: f"{path}.{its}" for its, value in plain._parameters.items() if value is not None}
            found[path] = Rounded(plain, draft, header, keys)
    return found
