"""DoRA's norms: how long each row of W0 + s · B A is, by products of thin matrices alone (arXiv:2402.09353).

‖w + s · b A‖² = ‖w‖² + 2 s · b · (A w) + s² · b (A Aᵀ) bᵀ for a row w of W0 and its row b of B. ‖w‖² never changes, and
A w is one more product by W0, of as many rows as the rank: no matrix as large as W0 is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.device import without_autocast
from veneer.errors import ModelError
from veneer.frozen.weight import BlockwiseWeight, DenseWeight, FrozenWeight, QuantisedLinear, frozen_weight


def exact_weight(base: nn.Module) -> FrozenWeight:
    """W0 (out, in) of a linear layer, or (dim, vocabulary) of an embedding, multiplied by without rounding x."""
    if isinstance(base, nn.Embedding):
        return DenseWeight(base.weight, transposed=True)
    return BlockwiseWeight(base.quantised, base.dtype) if isinstance(base, QuantisedLinear) else frozen_weight(base)


def row_norms(frozen: FrozenWeight, squares: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W0 + s · B A‖ of each row (out,), of A (rank, in), B (out, rank) and ``squares`` ‖w‖² (out,); a constant to the
    gradient, as in section 4.3 of the paper."""
    with torch.no_grad(), without_autocast(A.device.type):
        A, B = A.to(squares.dtype), B.to(squares.dtype)
        crossed = frozen.product(A).t()  # (out, rank)
        grown = squares + scale * ((2 * crossed + scale * (B @ (A @ A.t()))) * B).sum(1)
        return grown.clamp_min(torch.finfo(grown.dtype).tiny).sqrt()


def refuse_away(base: nn.Module, update: Tensor) -> None:
    """Raises ModelError where the values of the base's weight are not in memory and those of its update are."""
    weight = base.codes if isinstance(base, QuantisedLinear) else base.weight
    if isinstance(weight, Tensor) and weight.is_meta and not update.is_meta:
        raise ModelError(
            "DoRA reads the weights that it scales, and one of them is offloaded; keep the base in memory, or use LoRA "
            "without dora."
        )
