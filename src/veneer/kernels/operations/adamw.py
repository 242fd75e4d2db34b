"""AdamW over parameters that are one behind another in memory."""

from __future__ import annotations

from torch import Tensor

from veneer.kernels.operation import operation


def _fake_adamw(
    values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float, beta1: float, beta2: float,
    eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    return None


@operation(
    "(Tensor(a!) values, Tensor gradient, Tensor(b!) mean, Tensor(c!) square, float rate, float beta1, float beta2, "
    "float eps, float decay, int step) -> ()",
    fake=_fake_adamw,
)
def adamw(
    values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float, beta1: float, beta2: float,
    eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    """Step ``step``, counted from 1, of AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101, algorithm 2) on ``values``
    (n,) by their ``gradient`` and its moments, all fp32. Each operation rounds by itself, so the result is the same on
    every device; torch's own, which are fused in other ways, differ in last bits."""
    values.mul_(1 - rate * decay)
    mean.mul_(beta1).add_(gradient * (1 - beta1))
    square.mul_(beta2).add_((gradient * gradient).mul_(1 - beta2))
    root = square.sqrt().mul_((1 - beta2**step) ** -0.5).add_(eps)
    values.sub_((mean * (rate / (1 - beta1**step))).div_(root))
