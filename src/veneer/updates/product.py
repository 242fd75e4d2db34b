"""The adapted product, written by hand: y = W0 x + b + Σ s · (x Aᵀ) Bᵀ  (arXiv:2106.09685, equation 3).

With singular values (AdaLoRA), A ← λ ∘ A, which is formed again for the backward pass instead of kept.

What autograd would do for the same formula, and this does not: form B A, keep s · (x Aᵀ) Bᵀ beside the output, keep
a dropped copy of x. Forward adds the update into the frozen product's own output; backward adds into the frozen
product's own input gradient. Saved for backward: x, which the layers that share it share, and x Aᵀ (n, rank).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.device import autocasts
from veneer.frozen.weight import FrozenWeight
from veneer.kernels.operations.update import update_product, update_product_backward


def drawn_seed() -> int:
    """A seed of dropout, from torch's CPU generator."""
    return int(torch.randint(2**62, ()))


class Factors(NamedTuple):
    """One low-rank update in the form the product wants."""

    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank)
    scale: float
    dropout: float = 0.0  # probability; 0 when not training
    lam: Tensor | None = None  # (rank, 1): each row of A times its own number
    rows: Tensor | None = None  # which rows of the flattened x (n, in) it is for, each once, int64; None: all


def adapted_product(
    x: Tensor, frozen: FrozenWeight, bias: Tensor | None, updates: list[Factors], draw: Callable[[], int] = drawn_seed
) -> Tensor:
    """x (…, in) → x W0ᵀ + b + Σ s · (dropout(x) Aᵀ) Bᵀ, (…, out), in x's type; differentiable in x and in every A, B
    and λ. Updates that name ``rows`` are added to these alone, so rows of one batch may have different adapters.

    Neither W0 nor b gets a gradient. Dropout draws one seed for each update, from torch's CPU generator, so a run
    whose random state is restored drops the same elements, and checkpointed layers drop them again in the same way.
    """
    device = x.device.type
    if autocasts(device):
        # The function chooses its own types; autocast inside it would choose differently for forward and backward.
        with torch.autocast(device, enabled=False):
            return adapted_product(x.to(torch.get_autocast_dtype(device)), frozen, bias, updates, draw)
    seeds = [draw() if update.dropout else 0 for update in updates]
    recipe = [(update.scale, update.dropout, seed, update.rows) for update, seed in zip(updates, seeds, strict=True)]
    flat = [factor for update in updates for factor in (update.A, update.B, update.lam)]
    y: Tensor = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), frozen, bias, recipe, *flat
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def product_alone(x: Tensor, updates: list[Factors], draw: Callable[[], int] = drawn_seed) -> Tensor:
    """x (…, in) → Σ s · (dropout(x) Aᵀ) Bᵀ, (…, out): what `adapted_product` adds to the product by W0."""
    return adapted_product(x, _Zero((len(updates[0].B), x.shape[-1])), None, updates, draw)


class _Zero(FrozenWeight):
    """W0 = 0 (out, in), where the base's own product is taken elsewhere."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_zeros(x.shape[0], self.shape[0])

    def product_transposed(self, grad: Tensor) -> Tensor:
        return grad.new_zeros(grad.shape[0], self.shape[1])

    def dense(self) -> Tensor:
        return torch.zeros(self.shape)


def _dropped(x: Tensor, probability: float, seed: int) -> Tensor:
    """x with a share of its elements zeroed and the rest scaled up; the same ones for the same seed."""
    return mask_of(x, probability, seed).mul_(x)


def _inputs(x: Tensor, rows: Tensor | None, dropout: float, seed: int) -> Tensor:
    """What an update multiplies: its rows of x, dropped."""
    inputs = x if rows is None else x[rows]
    return _dropped(inputs, dropout, seed) if dropout else inputs


def _join(total: Tensor, part: Tensor, rows: Tensor | None, mask: Tensor | None) -> None:
    """Add an update's part of the input's gradient, times ``mask``, to these rows of the total, or to all."""
    if rows is not None:
        total.index_add_(0, rows, part if mask is None else part.mul_(mask))
    elif mask is not None:
        total.addcmul_(part, mask)


def mask_of(like: Tensor, probability: float, seed: int) -> Tensor:
    """What dropout multiplies a tensor like this one by; the same for the same seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    keep = torch.empty_like(like).bernoulli_(1 - probability, generator=generator)
    return keep.div_(1 - probability)


def _scaled(A: Tensor, lam: Tensor | None) -> Tensor:
    """λ ∘ A (r, in), or A where there is no λ."""
    return A if lam is None else A * lam


class _AdaptedProduct(torch.autograd.Function):
    """x (n, in), A (r, in), B (out, r), λ (r, 1) or None → y (n, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: FrozenWeight,
        bias: Tensor | None,
        recipe: list[tuple[float, float, int, Tensor | None]],
        *flat: Tensor | None,
    ) -> Tensor:
        ctx.frozen, ctx.recipe = frozen, recipe
        ctx.whole = frozen.with_update(x) if _is_whole(recipe) else None
        if ctx.whole is not None:
            A, B, lam = flat
            assert A is not None
            own = None if bias is None else bias.detach()
            y, low = ctx.whole.product(x, ctx.whole.weight, own, _scaled(A, lam), B, recipe[0][0])
            ctx.save_for_backward(x, low, *flat)
            return y  # type: ignore[no-any-return]
        y = frozen.product(x, bias)
        lows = []
        for (scale, dropout, seed, rows), A, B, lam in zip(recipe, flat[::3], flat[1::3], flat[2::3], strict=True):
            assert A is not None
            assert B is not None
            inputs = _inputs(x, rows, dropout, seed)
            into = y if rows is None else y[rows]
            lows.append(update_product(inputs, _scaled(A, lam), B, scale, into))
            if rows is not None:
                y[rows] = into
        ctx.save_for_backward(x, *lows, *flat)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = len(ctx.recipe)
        lows, flat = saved[:count], saved[count:]
        if ctx.whole is not None:
            return _whole_backward(ctx, grad, x, lows[0], *flat)
        grad_x = ctx.frozen.product_transposed(grad) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        wanted = ctx.needs_input_grad[4:]
        for i, ((scale, dropout, seed, rows), low) in enumerate(zip(ctx.recipe, lows, strict=True)):
            A, B, lam = flat[3 * i : 3 * i + 3]
            scaled = _scaled(A, lam)
            inputs = _inputs(x, rows, dropout, seed)
            grad_y = grad if rows is None else grad[rows]
            wants_A, wants_B, wants_lam = wanted[3 * i : 3 * i + 3]
            # The gradient of a dropped input is masked, and that of some rows put in their places, before it joins the
            # others.
            apart = dropout or rows is not None
            into = torch.zeros_like(inputs) if apart and grad_x is not None else grad_x
            grad_A = grad_B = None
            if wants_A or wants_B or wants_lam:
                grad_A, grad_B = update_product_backward(grad_y, inputs, low, scaled, B, scale, into)
            elif into is not None:  # a frozen update, which hands gradients on: grad · B · A
                update_product(grad_y, B.t(), scaled.t(), scale, into)
            if grad_x is not None and into is not None and apart:
                _join(grad_x, into, rows, mask_of(inputs, dropout, seed) if dropout else None)
            grads += _of_factors(grad_A, grad_B, A, lam, wants_A, wants_B, wants_lam)
        return grad_x, None, None, None, *grads


def _is_whole(recipe: list[tuple[float, float, int, Tensor | None]]) -> bool:
    """Whether one update is added to all rows of x as they are, so that it may be part of the frozen product."""
    return len(recipe) == 1 and not recipe[0][1] and recipe[0][3] is None


def _whole_backward(
    ctx: Any, grad: Tensor, x: Tensor, low: Tensor, A: Tensor, B: Tensor, lam: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The backward pass where the update was part of the frozen product."""
    wants_x, (wants_A, wants_B, wants_lam) = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
    learns = wants_A or wants_B or wants_lam
    grad_x, grad_A, grad_B = ctx.whole.gradients(
        grad, ctx.whole.weight, x, low, _scaled(A, lam), B, ctx.recipe[0][0], wants_x, learns
    )  # fmt: skip
    grads = _of_factors(grad_A if learns else None, grad_B, A, lam, wants_A, wants_B, wants_lam)
    return grad_x if wants_x else None, None, None, None, *grads


def _of_factors(
    grad_A: Tensor | None, grad_B: Tensor | None, A: Tensor, lam: Tensor | None, wants_A: bool, wants_B: bool,
    wants_lam: bool,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of A, B and λ from that of λ ∘ A: row i of λ gets its product with A's, and A's is λ's share."""
    grad_lam = None
    if grad_A is not None and lam is not None and wants_lam:
        grad_lam = (grad_A * A).sum(1, keepdim=True).to(lam.dtype)
    return [_scaled(grad_A, lam) if grad_A is not None and wants_A else None, grad_B if wants_B else None, grad_lam]
