"""Rotary position embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.operation import operation


def _fake_rotate(x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


@operation("(Tensor x, Tensor cosines, Tensor sines, bool transposed) -> Tensor", fake=_fake_rotate)
def rotate(x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool) -> Tensor:
    """x (batch, heads, tokens, dim) rotated by the angles of the positions (Su et al., 2021, arXiv:2104.09864): cosines
    and sines (batch or 1, tokens, dim), halves apart as transformers has them; a new tensor with the strides of one of
    (batch, tokens, heads, dim). ``transposed``: by the transposed matrix, which takes gradients back."""
    a, b = x.transpose(1, 2).chunk(2, dim=-1)
    (c0, c1), (s0, s1) = (table.unsqueeze(2).chunk(2, dim=-1) for table in (cosines, sines))
    halves = (a * c0 + b * s1, b * c1 - a * s0) if transposed else (a * c0 - b * s0, b * c1 + a * s1)
    return torch.cat(halves, dim=-1).transpose(1, 2)


def differentiable_rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`rotate`, differentiable in x; saves cosines and sines alone."""
    y: Tensor = _Rotate.apply(x, cosines, sines)  # type: ignore[no-untyped-call]
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return rotate(x, cosines, sines, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return rotate(grad, cosines, sines, True), None, None
