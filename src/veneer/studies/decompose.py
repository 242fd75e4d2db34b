"""Singular values of what was trained: low-rank updates and whole changes, cut and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from veneer.updates.layers import Pair


def of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, rank), S (rank,) and V (rank, in) of B A with B (out, rank), A (rank, in), without forming it: fp64.

    B = Q₁ R₁ and Aᵀ = Q₂ R₂ leave the decomposition of R₁ R₂ᵀ (rank, rank).
    """
    left, upper = torch.linalg.qr(B.detach().double())
    right, lower = torch.linalg.qr(A.detach().double().T)
    U, S, V = torch.linalg.svd(upper @ lower.T)
    return left @ U, S, V @ right.T


@torch.no_grad()
def truncate(update: Pair, U: Tensor, S: Tensor, V: Tensor, rank: int) -> None:
    """Make ``update`` the nearest of ``rank`` to the one that U, S and V are of; its shapes stay, the rest is zero."""
    root = S.sqrt()
    root[rank:] = 0
    update.B.copy_(U * root)
    update.A.copy_(root[:, None] * V)


class Changes:
    """What training changed in the matrices of a model: ΔW = U diag(S) V of each, by name.

    ``most``: singular vectors that are kept. S has all min(out, in) values.
    """

    @torch.no_grad()
    def __init__(self, before: nn.Module, after: nn.Module, names: list[str], most: int) -> None:
        self._model, self._before, self._after = before, {}, {}
        self.values: dict[str, Tensor] = {}
        self._left: dict[str, Tensor] = {}
        self._right: dict[str, Tensor] = {}
        for name in names:
            weight, other = (model.get_parameter(f"{name}.weight") for model in (before, after))
            U, S, V = torch.linalg.svd(other - weight, full_matrices=False)
            self._before[name], self._after[name], self.values[name] = weight.detach().clone(), other, S
            self._left[name], self._right[name] = U[:, :most] * S[:most], V[:most]

    def energy(self, name: str, rank: int) -> float:
        """Σ σ² of the first ``rank`` over that of all; 1 where nothing changed."""
        squares = self.values[name].double().square()
        return float(squares[:rank].sum() / squares.sum()) if float(squares.sum()) else 1.0

    @torch.no_grad()
    def put(self, rank: int | None) -> None:
        """Make the matrices of the model before those plus the part of ``rank`` of their change, or all of it."""
        for name, weight in self._before.items():
            own = self._model.get_parameter(f"{name}.weight")
            if rank is None:
                own.copy_(self._after[name])
            else:
                own.copy_(weight + self._left[name][:, :rank] @ self._right[name][:rank])


def overlap(one: Tensor, other: Tensor, directions: int) -> float:
    """φ of the spans of the first columns of two matrices (dim, n) whose columns are orthonormal.

    ‖U₁ᵀ U₂‖²_F / directions (Hu et al., 2021, section 7.2): 1 for the same span, 0 for orthogonal ones; of random ones
    directions / dim on average.
    """
    return float((one[:, :directions].T @ other[:, :directions]).square().sum()) / directions
