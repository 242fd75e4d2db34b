"""A and B that begin as what quantising lost, as far as their rank goes (LoftQ, Li et al., 2023, arXiv:2310.08659).

LoftQ alternates: Q = quantise(W − B A), then A and B from the largest singular values of W − Q. In the first iteration
Q is the base as it is loaded, and the adapter is one like any other. From the second on Q is another base than the one
that everybody makes of W, and the adapter fits that one only: it has to be saved, too (base_file.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.device import exact_dtype
from veneer.errors import TargetError
from veneer.frozen.blockwise import Quantised, dense, quantise
from veneer.frozen.weight import QuantisedLinear
from veneer.models.bnb_file import TYPES
from veneer.models.original import OriginalWeights
from veneer.updates.layers import new_factors
from veneer.updates.select import Chosen


def loftq(weight: Tensor, rank: int, iterations: int = 1, **how: Any) -> tuple[Quantised, Tensor, Tensor]:
    """Q, A (rank, in) and B (out, rank), fp32, with Q + B A near ``weight`` (out, in): algorithm 1 of the paper.

    ``how``: the options of `quantise`.
    """
    weight = weight.float()
    rest = weight
    for _ in range(iterations):
        quantised = quantise(rest, **how)
        A, B = best_factors(weight - dense(quantised), rank)
        rest = weight - B @ A
    return quantised, A, B


def best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k) whose product is nearest to ``matrix`` (out, in), fp32: its singular values, halved
    between them (square roots), the largest first; k = min(rank, out, in).

    From the eigenvectors of the smaller Gram matrix in fp64, which take a third of the time of a decomposition in fp32.
    """
    if matrix.shape[0] > matrix.shape[1]:
        A, B = best_factors(matrix.t(), rank)
        return B.t().contiguous(), A.t().contiguous()
    exact = matrix.to(exact_dtype(matrix.device))
    _, vectors = torch.linalg.eigh(exact @ exact.t())  # ascending
    left = vectors[:, -rank:].flip(1)  # (out, k)
    right = left.t() @ exact  # (k, in), its rows as long as the singular values
    root = right.norm(dim=1).sqrt()
    return (right / root.clamp(min=torch.finfo(root.dtype).tiny)[:, None]).float(), (left * root).float()


@dataclass(frozen=True)
class Start:
    """A and B of a module, and the codes that its base must have for them: None where it has them already."""

    A: Tensor
    B: Tensor
    quantised: Quantised | None


def loftq_starts(model: nn.Module, chosen: list[Chosen], iterations: int) -> dict[str, Start]:
    """Module name → where it starts, with s · B A nearest to W − Q, for each quantised module of ``chosen``.

    W is read from where the model was loaded from, one weight after another. Raises TargetError when no module is
    quantised, one is not what its W is quantised to, or more than one iteration is asked of a storage in which a
    changed base cannot be saved; ModelError when the Ws are not at hand.
    """
    quantised = {c.name: c for c in chosen if isinstance(c.module, QuantisedLinear)}
    if not quantised:
        raise TargetError(
            "init = 'loftq' starts from what quantising lost, and none of the targets is quantised; load the model "
            "with storage='nf4', or use init = 'kaiming'."
        )
    kinds = {c.module.storage for c in quantised.values() if isinstance(c.module, QuantisedLinear)} - set(TYPES)
    if iterations > 1 and kinds:
        raise TargetError(
            f"loftq_iterations = {iterations} changes the base, which could not be saved in {min(kinds)}; use "
            f"{' or '.join(TYPES)}, or loftq_iterations = 1."
        )
    weights = OriginalWeights(model)
    return {name: _start(c, weights.read(name), iterations) for name, c in quantised.items()}


def original(chosen: Chosen, weight: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """A layer's weight as it was read, (out, in) in fp32, and how it is quantised. Raises TargetError where its codes
    are not those of this weight."""
    layer = chosen.module
    assert isinstance(layer, QuantisedLinear)
    weight = (weight.t() if layer.transposed else weight).to(layer.codes.device, torch.float32)
    kept = layer.quantised
    double = kept.nested_scales is not None
    how: dict[str, Any] = {"storage": kept.storage, "block_size": kept.block_size, "double_quantisation": double}
    if weight.shape != kept.shape or not torch.equal(quantise(weight, chosen.name, **how).codes, kept.codes):
        raise TargetError(
            f"{chosen.name} is not what its weight on disk is quantised to; was the model changed after it was loaded? "
            f"Load it again, or use init = 'kaiming'."
        )
    return weight, how


def _start(chosen: Chosen, weight: Tensor, iterations: int) -> Start:
    weight, how = original(chosen, weight)
    layer = chosen.module
    changed, found_A, found_B = loftq(weight, chosen.rank, iterations, **how)
    # A direction in which nothing was lost starts as it does without LoftQ: two zeros would never learn.
    A, B = new_factors(layer, chosen.rank, "kaiming")
    lost = found_B.any(dim=0).nonzero().flatten()
    A[lost], B[:, lost] = found_A[lost], found_B[:, lost] / chosen.scale
    return Start(A, B, changed if iterations > 1 else None)
