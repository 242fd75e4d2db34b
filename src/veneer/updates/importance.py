"""AdaLoRA's arithmetic over all matrices at once: how much each triplet matters, and the pull towards orthogonality.

The parts of a matrix's triplets are λ (rank, 1), P (out, rank) and Q (rank, in): a triplet is a row of λ and of Q, and
a column of P. Parts of one shape are stacked and worked on together, up to a megabyte at a time, which stays in the
cache: SmolLM2's 210 matrices are worked on in 18 stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.updates.layers import Triplets

_LARGEST = 2**18  # elements of a stack
LAM, P, Q = range(3)
PARTS = 3  # part k of matrix i is number PARTS · i + k


class Stack(NamedTuple):
    """Parts of one kind (LAM, P or Q) and one shape, by number."""

    kind: int
    numbers: list[int]

    def of(self, parts: Sequence[Tensor]) -> Tensor:
        """(members, *shape): a copy, in fp32 at least, on the first one's device."""
        first = parts[self.numbers[0]]
        dtype = torch.promote_types(first.dtype, torch.float32)
        return torch.stack([parts[number].to(first.device, dtype) for number in self.numbers])


def parts_of(triplets: Sequence[Triplets], what: Callable[[Tensor], Tensor] = Tensor.detach) -> list[Tensor]:
    """λ, P and Q of all matrices, or ``what`` of each (its gradient, a moment)."""
    return [what(part) for update in triplets for part in (update.lam, update.P, update.Q)]


def stacks_by_shape(triplets: Sequence[Triplets]) -> list[Stack]:
    """The parts grouped by kind and shape, in stacks of at most `_LARGEST`; a matrix of rank 0 has none."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for number, part in enumerate(parts_of(triplets)):
        if part.numel():
            groups.setdefault((number % PARTS, *part.shape), []).append(number)
    stacks = []
    for (kind, height, width), numbers in sorted(groups.items()):
        size = max(1, _LARGEST // (height * width))
        stacks += [Stack(kind, numbers[i : i + size]) for i in range(0, len(numbers), size)]
    return stacks


class Importance:
    """Sensitivity and uncertainty of every weight, smoothed over the steps (arXiv:2303.10512, equations 8 to 11)."""

    def __init__(self, triplets: Sequence[Triplets], stacks: Sequence[Stack], beta1: float, beta2: float) -> None:
        self._matrices, self._rank = len(triplets), triplets[0].rank
        self._betas = beta1, beta2
        self._stacks = stacks
        like = [stack.of(parts_of(triplets)) for stack in stacks]
        self.sensitivity = [torch.zeros_like(tensor) for tensor in like]  # Ī, (members, *shape) each
        self.uncertainty = [torch.zeros_like(tensor) for tensor in like]  # U

    def fits(self, triplets: Sequence[Triplets]) -> bool:
        """Whether this is still of the parameters' type and on their device."""
        parts = parts_of(triplets)
        like = [parts[stack.numbers[0]] for stack in self._stacks]
        return all(
            (tensor.device, tensor.dtype) == (part.device, torch.promote_types(part.dtype, torch.float32))
            for tensor, part in zip(self.sensitivity, like, strict=True)
        )

    def update(self, number: int, weights: Tensor, gradients: Tensor) -> None:
        """Take in one step's weights and their gradients, of stack ``number``.

        I = |w g|,  Ī ← β1 Ī + (1 − β1) I,  U ← β2 U + (1 − β2) |I − Ī|.
        """
        beta1, beta2 = self._betas
        smooth, spread = self.sensitivity[number], self.uncertainty[number]
        now = (weights * gradients).abs_()
        smooth.lerp_(now, 1 - beta1)
        spread.lerp_(now.sub_(smooth).abs_(), 1 - beta2)

    def scores(self) -> Tensor:
        """S (matrices, rank): of each triplet s(λ) + mean s(P) + mean s(Q), with s = Ī U (equation 9)."""
        first = self.sensitivity[0]
        means = first.new_empty(PARTS * self._matrices, self._rank)
        for stack, smooth, spread in zip(self._stacks, self.sensitivity, self.uncertainty, strict=True):
            means[stack.numbers] = (smooth * spread).mean(1 if stack.kind == P else 2).to(means)
        return means.view(self._matrices, PARTS, self._rank).sum(1)


def most_important(scores: Tensor, costs: Tensor, budget: int) -> Tensor:
    """The triplets with the largest scores, as many as the budget pays for; bool (matrices, rank), of equals the first.

    ``costs`` (matrices,): what a triplet of each matrix costs; whole numbers.
    """
    order = scores.flatten().sort(descending=True, stable=True).indices
    spent = costs.to(scores.device)[order // scores.shape[1]].cumsum(0)
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[order[spent <= budget]] = True
    return kept.view(scores.shape)


def orthogonality(kind: int, stack: Tensor, weight: float, form: str, matrices: int) -> tuple[Tensor, Tensor | None]:
    """‖PᵀP − I‖ or ‖QQᵀ − I‖ of each in ``stack`` (members, *shape), of ``kind`` P or Q, (members,); and the
    regulariser's gradient, of the stack's shape, where ``weight`` is not zero.

    squared (equation 4): R = γ Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖², so dR/dP = 4γ P (PᵀP − I) and dR/dQ = 4γ (QQᵀ − I) Q.
    mean-norm (peft): R = γ · mean of ‖PᵀP − I‖ and ‖QQᵀ − I‖ over all P and Q, so dR/dP = γ/n P (PᵀP − I) / ‖PᵀP − I‖
    for n ``matrices``.
    """
    rows = stack.mT if kind == P else stack
    unit = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    defect = torch.baddbmm(unit.expand(len(rows), -1, -1), rows, rows.mT, beta=-1)
    norm = torch.linalg.matrix_norm(defect)
    if not weight:
        return norm, None
    if form == "mean-norm":
        # At the very minimum the norm has no derivative; 0 is one of its subgradients there.
        defect *= (weight / matrices / norm.clamp_min(torch.finfo(norm.dtype).tiny))[:, None, None]
    else:
        defect *= 4 * weight
    return norm, stack @ defect if kind == P else defect @ stack
