"""Cross-entropies of logits with labels, and their gradient in the logits' place: a row a program, of any length."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.operations import cross_entropy as operations
from veneer.kernels.triton.launch import check_like, kernels_take, power_of_two, warps

_WIDTH = 4096  # columns at a time
_LOWEST = tl.constexpr(-3.4e38)  # a maximum to begin with: of −∞, the difference from it would be no number


@triton.jit
def cross_entropy_rows(
    logits, labels, losses, width, stride, smoothing, GRADIENT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    label = tl.load(labels + row)
    # Before the sums, at which the warps wait for one another: the gradient takes its place. No number outside the row.
    picked = tl.load(start + label, mask=(label >= 0) & (label < width), other=float("nan")).to(tl.float32)
    column = tl.arange(0, WIDTH)
    top = tl.full((WIDTH,), _LOWEST, tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    plain = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, width, WIDTH):  # each lane sums over its own columns
        keep = first + column < width
        value = tl.load(start + first + column, mask=keep, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        plain += tl.where(keep, value, 0.0)
        top = higher
    largest = tl.max(top, 0)
    sum_of_all = tl.sum(total * tl.exp(top - largest), 0)
    # Relative to the largest, so that nothing large is subtracted from something large.
    target = picked - largest
    if smoothing != 0:
        target = target + smoothing * (tl.sum(plain, 0) / width - largest - target)
    tl.store(losses + row, (tl.log(sum_of_all) - target).to(losses.dtype.element_ty))
    if GRADIENT:
        share = 1.0 / sum_of_all
        for first in range(0, width, WIDTH):
            keep = first + column < width
            value = tl.load(start + first + column, mask=keep, other=-float("inf")).to(tl.float32)
            slope = tl.exp(value - largest) * share
            slope = tl.where(first + column == label, slope - (1.0 - smoothing), slope) - smoothing / width
            tl.store(start + first + column, slope.to(logits.dtype.element_ty), mask=keep)


def triton_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    if not kernels_take(logits):
        return operations.cross_entropy.definition(logits, labels, smoothing)
    return _rows(logits if logits.stride(1) == 1 else logits.contiguous(), labels, smoothing, False)


def triton_cross_entropy_gradient(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    if not (kernels_take(logits) and logits.stride(1) == 1):
        return operations.cross_entropy_gradient.definition(logits, labels, smoothing)
    return _rows(logits, labels, smoothing, True)


def _rows(logits: Tensor, labels: Tensor, smoothing: float, gradient: bool) -> Tensor:
    rows, width = logits.shape
    check_like("labels", labels, logits, (rows,))
    losses = logits.new_empty(rows, dtype=torch.float64)
    tile = min(_WIDTH, power_of_two(width))
    cross_entropy_rows[(rows,)](
        logits, labels.contiguous(), losses, width, logits.stride(0), smoothing, GRADIENT=gradient, WIDTH=tile,
        num_warps=warps(tile),
    )  # fmt: skip
    return losses
