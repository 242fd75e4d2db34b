"""Cross-entropies of logits with labels, and their gradient, which takes the logits' place."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.device import exact_dtype
from veneer.kernels.operation import operation

_ROWS = 8  # that are normalised together, and stay in the cache from pass to pass


def _fake_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=exact_dtype(logits.device))


@operation("(Tensor logits, Tensor labels, float smoothing) -> Tensor", fake=_fake_cross_entropy)
def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """−Σ target · log softmax(logits) of each row (n,), fp64 where the device has it, computed in fp32 at least. logits
    (n, vocabulary); labels int64 (n,); the target is (1 − smoothing) · onehot(label) + smoothing / vocabulary (Szegedy
    et al., 2016, arXiv:1512.00567, section 7)."""
    return _cross_entropy(logits, labels, smoothing, gradient=False)


@operation("(Tensor(a!) logits, Tensor labels, float smoothing) -> Tensor", fake=_fake_cross_entropy)
def cross_entropy_gradient(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """`cross_entropy`; and ``logits`` become the gradient of its sum, softmax(logits) − target."""
    return _cross_entropy(logits, labels, smoothing, gradient=True)


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, gradient: bool) -> Tensor:
    losses = _fake_cross_entropy(logits, labels, smoothing)
    parts = (torch.split(tensor, _ROWS) for tensor in (logits, labels[:, None], losses[:, None]))
    for block, places, into in zip(*parts, strict=True):
        exact = block.to(torch.promote_types(block.dtype, torch.float32))
        below = exact - exact.amax(-1, keepdim=True)
        picked = below.gather(-1, places)
        if smoothing:
            picked = picked.lerp(below.mean(-1, keepdim=True), smoothing)
        shares = below.exp_()
        sums = shares.sum(-1, keepdim=True)
        into.copy_(sums.log() - picked)
        if gradient:
            shares.div_(sums).scatter_add_(-1, places, torch.full_like(picked, smoothing - 1))
            block.copy_(shares.sub_(smoothing / block.shape[-1]))
    return losses
