"""The weights that a quantised model's codes were made from, read again from where the model was loaded from."""

from __future__ import annotations

import copy
from typing import Any

import transformers
from accelerate import init_empty_weights
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from veneer.errors import ModelError
from veneer.models.bnb_file import is_bitsandbytes
from veneer.models.source import resolve
from veneer.models.tensors import tensors_of


class OriginalWeights:
    """Of a model that `load` quantised, one weight at a time.

    Raises ModelError when they are not at hand: the model was loaded from codes, is gone from its place, or its
    checkpoint's tensors are not the model's own one by one.
    """

    def __init__(self, model: Any) -> None:
        self._name = str(getattr(model, "name_or_path", ""))
        if not self._name:
            raise ModelError(f"Where this {type(model).__name__} was loaded from is not known; use veneer.load.")
        path, _ = resolve(self._name)
        if path.is_dir() and is_bitsandbytes(transformers.AutoConfig.from_pretrained(path), self._name):
            raise ModelError(
                f"{self._name} holds codes, and not the weights that they were made from; load the model that it was "
                f"quantised from, with storage='nf4'."
            )
        with init_empty_weights(include_buffers=False):
            plain = type(model)(copy.deepcopy(model.config))
        conversions = get_model_conversion_mapping(plain, add_legacy=False)
        try:
            self._tensors = tensors_of(path)
        except ValueError as error:
            raise ModelError(f"Single weights cannot be read from {self._name}: {error}.") from None
        self._tensors.rename(plain)
        if not all(isinstance(conversion, WeightRenaming) for conversion in conversions):
            raise ModelError(f"Single weights cannot be read from {self._name}, which keeps several of them joined.")
        self._prefix = f"{model.base_model_prefix}."

    def read(self, module: str) -> Tensor:
        """The weight of the module of that name, as the checkpoint has it. Raises ModelError when it has none."""
        names = self._tensors.names()
        # A checkpoint of a body alone has no name for the body.
        for name in (f"{module}.weight", f"{module.removeprefix(self._prefix)}.weight"):
            if name in names:
                return self._tensors.read(name)
        raise ModelError(f"{self._name} holds no {module}.weight, from which its codes could have been made.")
