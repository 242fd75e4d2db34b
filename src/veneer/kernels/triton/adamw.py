"""AdamW over parameters that are one behind another: all of them by one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.triton.launch import EXACT, check_tensor

_WIDTH = 1024


@triton.jit
def adamw_step(
    values, gradient, mean, square, keep_share, rate, beta1, rest1, beta2, rest2, root_factor, eps, elements,
    WIDTH: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = place < elements
    slope = tl.load(gradient + place, mask=inside, other=0.0)
    first = tl.load(mean + place, mask=inside, other=0.0) * beta1 + slope * rest1
    second = tl.load(square + place, mask=inside, other=0.0) * beta2 + slope * slope * rest2
    root = tl.sqrt_rn(second) * root_factor + eps
    value = tl.load(values + place, mask=inside, other=0.0) * keep_share
    tl.store(values + place, value - tl.div_rn(first * rate, root), mask=inside)
    tl.store(mean + place, first, mask=inside)
    tl.store(square + place, second, mask=inside)


def triton_adamw(
    values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float, beta1: float, beta2: float,
    eps: float, decay: float, step: int,
) -> None:  # fmt: skip
    elements = values.numel()
    for name, tensor in (("values", values), ("gradient", gradient), ("mean", mean), ("square", square)):
        check_tensor(name, tensor, torch.float32, elements, values.device)
    if elements:
        adamw_step[(triton.cdiv(elements, _WIDTH),)](
            values, gradient, mean, square, 1 - rate * decay, rate / (1 - beta1**step), beta1, 1 - beta1, beta2,
            1 - beta2, (1 - beta2**step) ** -0.5, eps, elements, WIDTH=_WIDTH, **EXACT,
        )  # fmt: skip
