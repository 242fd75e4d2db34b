"""DPO: the chosen answer becomes likelier than the rejected one, as measured against a reference.

Rafailov et al., 2023, "Direct Preference Optimization", arXiv:2305.18290.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−log σ(β (log πθ(y_w|x)/π_ref(y_w|x) − log πθ(y_l|x)/π_ref(y_l|x))), equation 7; (pairs,).

    ``chosen``, ``rejected`` (pairs,): the log-probability of each answer less that of the reference, nats.

    Example:
        >>> import torch
        >>> dpo_loss(torch.tensor([1.0]), torch.tensor([1.0]), beta=0.1)  # no difference: log 2
        tensor([0.6931])
    """
    return -F.logsigmoid(beta * (chosen - rejected))
