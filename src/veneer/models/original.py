"""The weights that a quantised model's codes were made from, read again from where the model was loaded from."""

from __future__ import annotations

import copy
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from veneer.errors import ModelError
from veneer.models.checkpoint import Checkpoint
from veneer.models.joined import NotTensorByTensor


class OriginalWeights:
    """The weights of a model that `load` quantised, one at a time.

    Raises ModelError when they are not available: the model was loaded from codes, is gone from its place, or its
    checkpoint's tensors are not the model's own one by one.
    """

    def __init__(self, model: Any) -> None:
        self._name = str(getattr(model, "name_or_path", ""))
        if not self._name:
            raise ModelError(f"Where this {type(model).__name__} was loaded from is not known; use veneer.load.")
        checkpoint = Checkpoint(self._name)
        if checkpoint.is_bitsandbytes:
            raise ModelError(
                f"{self._name} holds codes, and not the weights that they were made from; load the model that it was "
                f"quantised from, with storage='nf4'."
            )
        with init_empty_weights(include_buffers=False):
            plain = type(model)(copy.deepcopy(model.config))
        conversions = get_model_conversion_mapping(plain, add_legacy=False)
        try:
            self._tensors = checkpoint.tensors()
            self._tensors.rename(plain)
        except NotTensorByTensor as reason:
            raise ModelError(f"Single weights cannot be read from {self._name}: {reason}.") from None
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
