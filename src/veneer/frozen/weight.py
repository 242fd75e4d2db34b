"""FrozenWeight: how W0 is kept, and how to multiply by it forward and backward.

Storage type and compute type are different things: a product runs in the type of its input, whatever W0 is kept in.
Where the two differ, W0 is expanded a panel at a time into one reused buffer: no full-size copy of it exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from veneer.errors import TargetError
from veneer.frozen.blockwise import Quantised, converted, dense, few_token_product, panels, quantise
from veneer.frozen.config import CODE_BITS
from veneer.kernels.operators import FEW

_TENSORS = ("codes", "scales", "nested_scales", "offset")  # of a Quantised, and buffers of the layer that holds it


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
        bias = None if bias is None else bias.detach().to(x.dtype)
        if x.dtype is self._weight.dtype:
            return F.linear(x, self._weight, bias)
        y = x.new_empty(x.shape[0], self.shape[0])
        for rows, panel in converted(self._weight, x.dtype):
            torch.mm(x, panel.t(), out=y[:, rows])
        return y if bias is None else y.add_(bias)

    def product_transposed(self, grad: Tensor) -> Tensor:
        if grad.dtype is self._weight.dtype:
            return grad @ self._weight
        out = grad.new_zeros(grad.shape[0], self.shape[1])
        for rows, panel in converted(self._weight, grad.dtype):
            out.addmm_(grad[:, rows], panel)
        return out

    def dense(self) -> Tensor:
        return self._weight


class BlockwiseWeight(FrozenWeight):
    """A quantised weight, expanded panel by panel of rows into one buffer: no product makes a full-size copy of it."""

    def __init__(self, quantised: Quantised, dtype: torch.dtype = torch.float32) -> None:
        self._quantised, self._dtype = quantised, dtype
        self.shape = quantised.shape

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if 1 <= x.shape[0] <= FEW and x.dtype == torch.float32 and CODE_BITS[self._quantised.storage] == 4:
            y = few_token_product(x, self._quantised)
        else:
            y = x.new_empty(x.shape[0], self.shape[0])
            for rows, panel in panels(self._quantised, x.dtype):
                torch.mm(x, panel.t(), out=y[:, rows])
        return y if bias is None else y.add_(bias.detach())

    def product_transposed(self, grad: Tensor) -> Tensor:
        out = grad.new_zeros(grad.shape[0], self.shape[1])
        for rows, panel in panels(self._quantised, grad.dtype):
            out.addmm_(grad[:, rows], panel)
        return out

    def dense(self) -> Tensor:
        return dense(self._quantised, self._dtype)


class QuantisedLinear(nn.Module):
    """y = W0 x + b with W0 (out, in) kept in a quantised storage; frozen, differentiable in x.

    ``dtype`` is the type W0 had, in which it is merged and given back; ``transposed`` says that it lay as (in, out).
    """

    codes: Tensor
    scales: Tensor
    nested_scales: Tensor | None
    offset: Tensor | None

    def __init__(self, quantised: Quantised, bias: Tensor | None, dtype: torch.dtype, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.out_features, self.in_features = quantised.shape
        self.storage, self.block_size = quantised.storage, quantised.block_size
        self.dtype = dtype
        for name in _TENSORS:
            self.register_buffer(name, getattr(quantised, name))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Module, name: str = "the weight", **how: Any) -> QuantisedLinear:
        """The quantised form of an nn.Linear or Conv1D called ``name``; ``how``: the options of `quantise`."""
        weight = frozen_weight(linear).dense()
        bias = cast("Tensor | None", linear.bias)
        made = cls(quantise(weight, name, **how), bias, weight.dtype, isinstance(linear, Conv1D))
        return made.train(linear.training)

    @property
    def quantised(self) -> Quantised:
        tensors = (getattr(self, name) for name in _TENSORS)
        return Quantised(self.storage, self.block_size, (self.out_features, self.in_features), *tensors)

    def replace(self, quantised: Quantised) -> None:
        """Keep these codes and scales, of another weight of the same shape and storage."""
        for name in _TENSORS:
            setattr(self, name, getattr(quantised, name))

    @property
    def weight(self) -> Tensor:
        """An empty stand-in of W0's type and device, for models that look at these; it holds no values."""
        return torch.empty(0, self.in_features, dtype=self.dtype, device=self.codes.device)

    def frozen(self) -> BlockwiseWeight:
        return BlockwiseWeight(self.quantised, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _frozen_layer(x, self.frozen(), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantisedLinear:
        # model.to(bfloat16) means the compute type: the scales stay the fp32 numbers that the codes were made with.
        kept = {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.storage}"


class StoredLinear(nn.Linear):
    """y = W0 x + b in the type of x, whatever W0 is kept in; differentiable in x, and in W0 where that is trained."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return _frozen_layer(x, frozen_weight(self), self.bias)


class StoredConv1D(Conv1D):  # type: ignore[misc]
    """The same of GPT-2's layer, whose W0 lies as (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return F.linear(x, self.weight.t().to(x.dtype), self.bias.to(x.dtype))
        return _frozen_layer(x, frozen_weight(self), self.bias)


STORED = {nn.Linear: StoredLinear, Conv1D: StoredConv1D}
PLAIN_TYPES = (*STORED, *STORED.values())  # the linear layers whose weight is a floating-point parameter


def _frozen_layer(x: Tensor, frozen: FrozenWeight, bias: Tensor | None) -> Tensor:
    """x (…, in) → x W0ᵀ + b (…, out), differentiable in x."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        y: Tensor = _FrozenProduct.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]), frozen, bias
        )
    return y.view(*x.shape[:-1], frozen.shape[0])


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
