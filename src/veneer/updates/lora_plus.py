"""LoRA+: B learns at a higher rate than A (Hayou et al., 2024, arXiv:2402.12354)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from veneer.arguments import described, refuse_no_model
from veneer.errors import ArgumentError, TargetError
from veneer.updates.adapter_file import adapter_tensors
from veneer.updates.config import LoRA
from veneer.updates.inner import inner_model
from veneer.updates.record import adapters_of

FACTOR = "factor"  # of a group: how many times the learning rate it has


def lora_plus(model: nn.Module, learning_rate: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: what is trained of the active adapters, B at ``ratio`` times the learning
    rate of the rest.

    With B go vectors, such as DoRA's magnitudes, as in the authors' code and in peft. Both matrices of an embedding
    have A's rate: there A begins at zero, and peft gives both a rate of their own. A group also holds its ``factor``,
    by which a schedule multiplies. Raises TargetError when no LoRA adapter is active, or nothing of it is trained.

    Example:
        >>> model = veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]))
        >>> groups = veneer.lora_plus(model, learning_rate=1e-4, ratio=16)
        >>> [(len(group["params"]), group["lr"]) for group in groups]
        [(2, 0.0001), (2, 0.0016)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    refuse_no_model("lora_plus", model)
    for name, value in (("learning_rate", learning_rate), ("ratio", ratio)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ArgumentError(f"lora_plus takes a number above 0 as {name}, not {described(value)}.")
    model = inner_model(model)
    record = adapters_of(model)
    others = [name for name in record.active if not isinstance(record.configs[name], LoRA)]
    if others or not record.active:
        raise TargetError(
            f"lora_plus is for LoRA adapters, and {f'{others[0]!r} is AdaLoRA' if others else 'none is active'}."
        )
    trained: dict[Tensor, str] = {}
    for name in record.active:
        for key, tensor in adapter_tensors(model, name).items():
            if tensor.requires_grad:
                trained.setdefault(tensor, key)
    if not trained:
        raise TargetError("Nothing of the active adapters is trained; load them with trainable=True.")
    faster = [tensor for tensor, key in trained.items() if "lora_B" in key or tensor.dim() == 1]
    others_than = {id(tensor) for tensor in faster}
    rest = [tensor for tensor in trained if id(tensor) not in others_than]
    groups = ((rest, 1.0), (faster, float(ratio)))
    return [{"params": its, "lr": learning_rate * factor, FACTOR: factor} for its, factor in groups if its]
