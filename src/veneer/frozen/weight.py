"""FrozenWeight: how W0 is kept, and how to multiply by it forward and backward.

Storage type and compute type are different things: a product runs in the type of its input, whatever W0 is kept in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from veneer.errors import TargetError
from veneer.frozen.blockwise import Quantised, expand_into, few_token_product, quantise
from veneer.kernels.operators import FEW

_PANEL = 2**19  # weights of a panel: 2 MB in fp32, which stays in the cache from its expansion to its product


class FrozenWeight(ABC):
    """W0 (out, in), never trained."""

    shape: tuple[int, int]

    @abstractmethod
    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (n, in) → a new x W0ᵀ + b (n, out), in x's type."""

    @abstractmethod
    def product_transposed(self, grad: Tensor) -> Tensor:
        """grad (n, out) → a new grad W0 (n, in), in grad's type."""

    @abstractmethod
    def dense(self) -> Tensor:
        """W0 as a matrix (out, in)."""


class DenseWeight(FrozenWeight):
    """A view of a floating-point parameter; ``transposed`` when it lies as (in, out), as GPT-2's Conv1D keeps it."""

    def __init__(self, weight: Tensor, transposed: bool = False) -> None:
        self._weight = weight.detach().t() if transposed else weight.detach()
        self.shape = (self._weight.shape[0], self._weight.shape[1])

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self._weight.to(x.dtype), None if bias is None else bias.detach().to(x.dtype))

    def product_transposed(self, grad: Tensor) -> Tensor:
        return grad @ self._weight.to(grad.dtype)

    def dense(self) -> Tensor:
        return self._weight


class BlockwiseWeight(FrozenWeight):
    """A 4-bit weight, expanded panel by panel of rows: no full-size copy of it is ever made by a product."""

    def __init__(self, quantised: Quantised, dtype: torch.dtype = torch.float32) -> None:
        self._quantised, self._dtype = quantised, dtype
        self.shape = quantised.shape

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if 1 <= x.shape[0] <= FEW and x.dtype == torch.float32:
            y = few_token_product(x, self._quantised)
        else:
            y = x.new_empty(x.shape[0], self.shape[0])
            for rows, panel in self._panels(x.dtype):
                y[:, rows] = x @ panel.t()
        return y if bias is None else y.add_(bias.detach())

    def product_transposed(self, grad: Tensor) -> Tensor:
        out = grad.new_zeros(grad.shape[0], self.shape[1])
        for rows, panel in self._panels(grad.dtype):
            out.addmm_(grad[:, rows], panel)
        return out

    def dense(self) -> Tensor:
        out = self._quantised.codes.new_empty(self.shape, dtype=self._dtype)
        expand_into(out, self._quantised, 0)
        return out

    def _panels(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their expansion, which the next one overwrites."""
        height = max(1, _PANEL // self.shape[1])
        buffer = self._quantised.codes.new_empty(min(height, self.shape[0]), self.shape[1], dtype=dtype)
        for first in range(0, self.shape[0], height):
            last = min(first + height, self.shape[0])
            panel = buffer[: last - first]
            expand_into(panel, self._quantised, first)
            yield slice(first, last), panel


class QuantisedLinear(nn.Module):
    """y = W0 x + b with W0 (out, in) kept in NF4 with double quantisation; frozen, differentiable in x.

    ``dtype`` is the type W0 had, in which it is merged and given back; ``transposed`` says that it lay as (in, out).
    """

    codes: Tensor
    scale_codes: Tensor
    scale_scales: Tensor
    offset: Tensor

    def __init__(self, quantised: Quantised, bias: Tensor | None, dtype: torch.dtype, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.out_features, self.in_features = quantised.shape
        self.dtype = dtype
        self.register_buffer("codes", quantised.codes)
        self.register_buffer("scale_codes", quantised.scale_codes)
        self.register_buffer("scale_scales", quantised.scale_scales)
        self.register_buffer("offset", quantised.offset)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Module, name: str = "the weight") -> QuantisedLinear:
        """The quantised form of an nn.Linear or Conv1D called ``name``."""
        weight = frozen_weight(linear).dense()
        bias = cast("Tensor | None", linear.bias)
        made = cls(quantise(weight, name), bias, weight.dtype, isinstance(linear, Conv1D))
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """An empty stand-in of W0's type and device, for models that look at these; it holds no values."""
        return torch.empty(0, self.in_features, dtype=self.dtype, device=self.codes.device)

    def frozen(self) -> BlockwiseWeight:
        shape = (self.out_features, self.in_features)
        quantised = Quantised(self.codes, self.scale_codes, self.scale_scales, self.offset, shape)
        return BlockwiseWeight(quantised, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            y: Tensor = _FrozenProduct.apply(  # type: ignore[no-untyped-call]
                x.reshape(-1, x.shape[-1]), self.frozen(), self.bias
            )
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantisedLinear:
        # model.to(bfloat16) means the compute type: the scales stay the fp32 numbers that the codes were made with.
        kept = {name: getattr(self, name) for name in ("scale_scales", "offset")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, storage=nf4"


class _FrozenProduct(torch.autograd.Function):
    """x (n, in) → x W0ᵀ + b (n, out); saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.frozen = frozen
        return frozen.product(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.frozen.product_transposed(grad), None, None


def frozen_weight(module: nn.Module) -> FrozenWeight:
    """The weight of a linear layer, as it is kept. Raises TargetError for a module that is none."""
    if isinstance(module, QuantisedLinear):
        return module.frozen()
    if isinstance(module, (nn.Linear, Conv1D)):
        return DenseWeight(cast(Tensor, module.weight), transposed=isinstance(module, Conv1D))
    raise TargetError(f"A {type(module).__name__} has no frozen weight to multiply by.")
