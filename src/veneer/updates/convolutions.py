"""Low-rank updates of convolutions, in PEFT's layout: A convolves to rank channels, and B, of kernel 1, after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import ModelError, TargetError
from veneer.frozen.called import place_of_update
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.layers import Adapted, Pair, training_dtype

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_FUNCTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d
}  # fmt: skip


class ConvPair(Pair):
    """ΔW = s · B A of a convolution: A (rank, in, *kernel), B (out, rank / groups, 1, …)."""

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (rank, in · kernel) and B (out, rank), where the base has one group."""
        return self.A.flatten(1), self.B.flatten(1)

    def convolved(self, x: Tensor, base: _Convolution) -> Tensor:
        """s · B(A(dropout(x))), in x's type; A sees all channels of x, whatever the groups, as in PEFT."""
        convolve = _FUNCTIONS[type(base)]
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        low = convolve(F.dropout(x, self.drops), A, None, base.stride, base.padding)
        return convolve(low, B, None, groups=base.groups) * self.scale


class AdaptedConv(Adapted):
    """y = W0 ∗ x + b + Σ s · B ∗ (A ∗ x) over nn.Conv1d, Conv2d or Conv3d, whose own forward is called."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for update in self._updates():
            y = y + update.convolved(x, cast(_Convolution, self.base))
        return y

    def _updates(self) -> list[ConvPair]:
        groups = [None] if self.rows is None else list(self.rows.groups())
        found = [[update for update in self.in_force(names) if isinstance(update, ConvPair)] for names in groups]
        if any(its != found[0] for its in found):
            raise ModelError(
                "A convolution of this model is adapted, and computes all rows together, so rows cannot have adapters "
                "of their own; generate with one adapter at a time."
            )
        return found[0]


def conv_shapes(base: _Convolution, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B of an update of this rank."""
    ones = (1,) * len(base.kernel_size)
    return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank // base.groups, *ones)


def new_conv_pair(base: _Convolution, rank: int, init: str, scale: float, dropout: float) -> ConvPair:
    """The update of a new adapter: A random, B zero."""
    A, B = (
        torch.zeros(shape, dtype=training_dtype(base.weight), device=place_of_update(base))
        for shape in conv_shapes(base, rank)
    )
    if init == "gaussian":
        nn.init.normal_(A, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(A, a=5**0.5)
    return ConvPair(A, B, scale, dropout)


def refuse_convolution(name: str, base: _Convolution, config: LoRA | AdaLoRA) -> None:
    """Raises TargetError where a convolution cannot be adapted as PEFT's files have it, or ``config`` asks for what
    they do not have."""
    kind = type(base).__name__
    if base.padding_mode != "zeros" or set(base.dilation) != {1}:
        what = f"padding {base.padding_mode}" if base.padding_mode != "zeros" else f"dilation {base.dilation}"
        raise TargetError(
            f"{name} is a {kind} with {what}, which PEFT leaves out of its updates, so the same adapter would compute "
            f"something else there; leave it out with exclude."
        )
    if isinstance(config, AdaLoRA):
        raise TargetError(f"{name} is a {kind}, which AdaLoRA does not adapt; leave it out, or use LoRA.")
    asked = "dora" if config.dora else f"init = {config.init!r}" if config.init == "pissa" else None
    if asked:
        raise TargetError(f"{name} is a {kind}, and {asked} is for linear layers; leave one of them out.")


def refuse_rank(name: str, base: _Convolution, rank: int) -> None:
    """Raises TargetError where the rank cannot be shared out among the groups of a convolution."""
    if rank % base.groups:
        raise TargetError(
            f"{name} is a {type(base).__name__} of {base.groups} groups, among which rank {rank} cannot be shared out; "
            f"use a multiple of {base.groups} (rank_pattern), or leave it out with exclude."
        )


def refuse_groups(path: str, wrapper: nn.Module) -> None:
    """Raises TargetError where a merge would need a convolution without groups: the update's A sees all channels."""
    if isinstance(wrapper, AdaptedConv) and wrapper.in_force() and cast(_Convolution, wrapper.base).groups > 1:
        raise TargetError(
            f"{path} is a {type(wrapper.base).__name__} of {cast(_Convolution, wrapper.base).groups} groups, whose "
            f"update is no convolution of these groups, here as in PEFT, so it cannot be merged; keep the adapter, or "
            f"train without this module."
        )
