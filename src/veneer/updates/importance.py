"""AdaLoRA's arithmetic over all matrices at once: how much each triplet matters, and the pull towards orthogonality.

The three parts of a matrix's triplets are looked at as λᵀ (1, rank), P (out, rank) and Qᵀ (in, rank): a column is a
triplet. Parts of one height are stacked and worked on together, up to a megabyte at a time, which stays in the cache:
SmolLM2's 210 matrices are worked on in some 20 stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.updates.layers import Triplets

_LARGEST = 2**18  # elements of a stack
PARTS = 3  # λ, P, Q: part k of matrix i is number PARTS · i + k


class Stack(NamedTuple):
    """Parts of one height and rank, by number."""

    numbers: list[int]
    height: int
    rank: int

    def of(self, parts: Sequence[Tensor]) -> Tensor:
        """(members, height, rank): a copy, in fp32 at least, on the first one's device."""
        first = parts[self.numbers[0]]
        dtype = torch.promote_types(first.dtype, torch.float32)
        return torch.stack([parts[number].to(first.device, dtype) for number in self.numbers])


def parts_of(triplets: Sequence[Triplets], what: Callable[[Tensor], Tensor] = Tensor.detach) -> list[Tensor]:
    """Of all matrices λᵀ, P and Qᵀ, or ``what`` of each (its gradient, a moment) seen in the same way; views."""
    return [part for update in triplets for part in (what(update.lam).t(), what(update.P), what(update.Q).t())]


def stacks_of(triplets: Sequence[Triplets]) -> list[Stack]:
    """The parts grouped by height and rank, in stacks of at most `_LARGEST`; a matrix of rank 0 has none."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, part in enumerate(parts_of(triplets)):
        if part.shape[1]:
            groups.setdefault((part.shape[0], part.shape[1]), []).append(number)
    stacks = []
    for (height, rank), numbers in sorted(groups.items()):
        size = max(1, _LARGEST // (height * rank))
        stacks += [Stack(numbers[i : i + size], height, rank) for i in range(0, len(numbers), size)]
    return stacks


class Importance:
    """Sensitivity and uncertainty of every weight, smoothed over the steps (arXiv:2303.10512, equations 8 to 11)."""

    def __init__(self, triplets: Sequence[Triplets], beta1: float, beta2: float) -> None:
        self._matrices, self._rank = len(triplets), triplets[0].rank
        self._betas = beta1, beta2
        self._stacks = stacks_of(triplets)
        like = [stack.of(parts_of(triplets)) for stack in self._stacks]
        self.sensitivity = [torch.zeros_like(tensor) for tensor in like]  # Ī, (members, height, rank) each
        self.uncertainty = [torch.zeros_like(tensor) for tensor in like]  # U

    def fits(self, triplets: Sequence[Triplets]) -> bool:
        """Whether this is still of the parameters' type and on their device."""
        parts = parts_of(triplets)
        like = [parts[stack.numbers[0]] for stack in self._stacks]
        return all(
            (tensor.device, tensor.dtype) == (part.device, torch.promote_types(part.dtype, torch.float32))
            for tensor, part in zip(self.sensitivity, like, strict=True)
        )

    def update(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Take in one step's weights and their gradients, as `parts_of` gives them.

        I = |w g|,  Ī ← β1 Ī + (1 − β1) I,  U ← β2 U + (1 − β2) |I − Ī|.
        """
        beta1, beta2 = self._betas
        for stack, smooth, spread in zip(self._stacks, self.sensitivity, self.uncertainty, strict=True):
            now = stack.of(weights).mul_(stack.of(gradients)).abs_()
            smooth.lerp_(now, 1 - beta1)
            spread.lerp_(now.sub_(smooth).abs_(), 1 - beta2)

    def scores(self) -> Tensor:
        """S (matrices, rank): of each triplet s(λ) + mean s(P) + mean s(Q), with s = Ī U (equation 9)."""
        first = self.sensitivity[0]
        means = first.new_empty(PARTS * self._matrices, self._rank)
        for stack, smooth, spread in zip(self._stacks, self.sensitivity, self.uncertainty, strict=True):
            means[stack.numbers] = (smooth * spread).mean(1).to(means)
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


def add_orthogonality(
    triplets: Sequence[Triplets], gradients: Sequence[Tensor], weight: float, form: str, scale: float | Tensor = 1.0
) -> Tensor:
    """Add the regulariser's gradient to those of P and Q, and give ‖PᵀP − I‖ and ‖QQᵀ − I‖ on average, ().

    squared (equation 4): R = γ Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖², so dR/dP = 4γ P (PᵀP − I) and dR/dQ = 4γ (QQᵀ − I) Q.
    mean-norm (peft): R = γ · mean of ‖PᵀP − I‖ and ‖QQᵀ − I‖ over all P and Q, so dR/dP = γ/n P (PᵀP − I) / ‖PᵀP − I‖
    for n matrices. ``scale`` multiplies what is added, as a loss scaler has multiplied what is there.
    """
    parts = parts_of(triplets)
    norms: list[Tensor] = []
    for stack in stacks_of(triplets):
        members = stack._replace(numbers=[number for number in stack.numbers if number % PARTS])  # λ is no matrix
        if not members.numbers:
            continue
        columns = members.of(parts)
        unit = torch.eye(stack.rank, dtype=columns.dtype, device=columns.device)
        defect = torch.baddbmm(unit.expand(len(columns), -1, -1), columns.mT, columns, beta=-1)
        norm = torch.linalg.matrix_norm(defect)
        norms.append(norm)
        if weight:
            if form == "mean-norm":
                # At the very minimum the norm has no derivative; 0 is one of its subgradients there.
                defect /= norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, None, None]
            factor = 4 * weight if form == "squared" else weight / len(triplets)
            pull = (columns @ defect) * (factor * scale)
            torch._foreach_add_(
                [gradients[number] for number in members.numbers],
                [slice_.to(gradients[number]) for number, slice_ in zip(members.numbers, pull, strict=True)],
            )
    return torch.cat([norm.to(norms[0].device) for norm in norms]).mean()
