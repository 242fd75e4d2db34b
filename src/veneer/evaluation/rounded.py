"""A model whose weights are what a GGUF file keeps of them, to measure what rounding costs before the file is used."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from veneer.device import META
from veneer.models.gguf_write import Draft


class Rounded(nn.Module):
    """A module with the weight that the file's tensor ``name`` gives, expanded for each call and dropped after it."""

    def __init__(self, module: nn.Module, draft: Draft, name: str) -> None:
        super().__init__()
        shell = copy.copy(module)
        shell._parameters = dict(module._parameters)
        weight = module._parameters["weight"]
        assert weight is not None
        shell._parameters["weight"] = nn.Parameter(torch.empty_like(weight, device=META), requires_grad=False)
        self.shell, self._draft, self._name = shell, draft, name

    def forward(self, *arguments: Any, **options: Any) -> Any:
        weight = self._draft.rounded(self._name)
        return torch.func.functional_call(self.shell, {"weight": weight}, arguments, options)


def rounded_layers(model: nn.Module, draft: Draft) -> dict[str, nn.Module]:
    """The modules of the plain ``model`` whose weight the file rounds, by name, each as a `Rounded`. Their codes are
    kept in the draft."""
    found: dict[str, nn.Module] = {}
    of_weight: dict[int, str] = {}  # by the identity of a weight that the file has
    for name, key in draft.names.items():
        module = model.get_submodule(key.rpartition(".")[0])
        if key.endswith(".weight") and draft.type_of(name).name != "F32":
            draft.keep_codes(name)
            of_weight[id(module._parameters["weight"])] = name
    for path, module in model.named_modules():  # a head that is the embedding has its weight
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in of_weight:
            found[path] = Rounded(module, draft, of_weight[id(weight)])
    return found
