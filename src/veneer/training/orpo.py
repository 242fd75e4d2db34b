"""ORPO: the odds of the chosen answer against those of the rejected one, beside the likelihood; no reference.

Hong, Lee and Thorne, 2024, "ORPO: Monolithic Preference Optimization without Reference Model", arXiv:2403.07691.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LOG_2 = math.log(2)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """L_OR = −log σ(log odds(y_w|x) / odds(y_l|x)), equation 7; (pairs,). Equation 6 adds it, times λ, to the mean
    cross-entropy of the chosen answers' tokens.

    ``chosen``, ``rejected`` (pairs,): the mean log-probability of an answer's tokens, nats.

    Example:
        >>> import torch
        >>> odds_ratio_loss(torch.tensor([-1.0]), torch.tensor([-1.0]))
        tensor([0.6931])
    """
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(log_probability: Tensor) -> Tensor:
    """log P / (1 − P), equation 4, of log P; exact for P near 0 and near 1."""
    x = log_probability
    small, near_one = torch.log1p(-x.clamp(max=-_LOG_2).exp()), torch.log(-torch.expm1(x.clamp(min=-_LOG_2)))
    return x - torch.where(x > -_LOG_2, near_one, small)
