"""KTO: a good answer becomes likelier and a bad one less likely, by how far each is from what the model says anyway.

Ethayarajh et al., 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kto_loss(
    answer: Tensor, desirable: Tensor, divergence: Tensor, beta: float, weights: tuple[float, float]
) -> Tensor:
    """λ_D (1 − σ(β (r − z0))) of a good answer, λ_U (1 − σ(β (z0 − r))) of a bad one, equation 8; (rows,).

    ``answer`` (rows,): r, the log-probability of each answer less that of the reference, nats; ``desirable`` (rows,):
    whether it is good; ``divergence`` (): z0, a constant; ``weights``: λ_D and λ_U.

    Example:
        >>> answers, good = torch.zeros(2), torch.tensor([True, False])
        >>> kto_loss(answers, good, torch.zeros(()), beta=0.1, weights=(1.0, 1.0))
        tensor([0.5000, 0.5000])
    """
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, *weights)
    return weight * (1 - torch.sigmoid(beta * sign * (answer - divergence)))


def kto_divergence(mismatched: Tensor) -> Tensor:
    """z0, the estimate of KL(πθ ‖ π_ref): the mean over the rows of the step, and no less than 0; ().

    ``mismatched`` (rows,): the log-probability of another row's answer to each prompt, less that of the reference, nats
    (section 4.2).
    """
    return mismatched.mean().clamp(min=0)
