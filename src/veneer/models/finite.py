"""Weights that are NaN, infinite or beyond all sense, refused by name: as the file has them, or in the type they were
converted to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.errors import ModelError

LARGEST = 1e18  # of which no trained weight comes near; a flipped bit in an exponent goes beyond it


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is a NaN or an infinity, or larger than `LARGEST`, whose square is infinite soon. One reduction
    and no copy."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch reduces no numbers of 8 bits
    low, high = torch.aminmax(wide.detach())
    largest = torch.finfo(torch.float64).max if tensor.dtype is torch.float64 else LARGEST
    return float(low) >= -largest and float(high) <= largest  # a NaN is both, and in no order


def refuse_weight_not_finite(tensor: Tensor, key: str, name: str) -> None:
    """Raises ModelError where the ``tensor`` called ``key`` of the model ``name`` holds a NaN or an infinity, which in
    fp16 is also what a value above 65504 becomes."""
    if is_finite(tensor):
        return
    if tensor.dtype is torch.float16 and not bool(torch.isnan(tensor).any()):
        raise ModelError(
            f"{key} of {name} is infinite in fp16, whose largest value is {torch.finfo(torch.float16).max:.0f}; load "
            f"it as bf16 or fp32."
        )
    raise ModelError(
        f"{key} of {name} holds a value that is not finite, or larger than {LARGEST:.0e}; the checkpoint is damaged, "
        f"or its training diverged."
    )


def refuse_model_not_finite(model: Any, name: str) -> None:
    """The same of every tensor that the model's checkpoint holds, scales of codes with them."""
    for key, tensor in model.state_dict().items():
        refuse_weight_not_finite(tensor, key, name)
