"""FrozenWeight: how W0 is kept, and how to multiply by it forward and backward.

Storage type and compute type are different things: a product runs in the type of its input.
Where the two differ, W0 is expanded a panel at a time into one reused buffer of eight megabytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from veneer.arguments import refuse_no_model
from veneer.device import autocasts
from veneer.errors import ModelError, TargetError
from veneer.frozen.blockwise import Quantised, converted, dense, few_row_product, panels, prepared_int8, quantise
from veneer.frozen.config import CODE_BITS
from veneer.kernels.backends import backend_of
from veneer.kernels.coded import CodedWeight
from veneer.kernels.dense import Multiply, linear
from veneer.kernels.operations.adapted import (
    Gradients,
    product_with_update,
    product_with_update_backward,
    product_with_update_coded,
    product_with_update_coded_backward,
)
from veneer.kernels.operations.products_int8 import GROUP

_TENSORS = ("codes", "scales", "nested_scales", "offset")  # of a Quantised, and buffers of the layer that holds it


_Panels = Iterator[tuple[slice, Tensor]]  # which rows of W0, and their values


class WithUpdate(NamedTuple):
    """A frozen weight, and what multiplies by it and a low-rank update of it in one product."""

    weight: Tensor | CodedWeight
    product: Callable[..., tuple[Tensor, Tensor]]  # `product_with_update`, or that of a weight in codes
    gradients: Callable[..., Gradients]

    def alone(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W0ᵀ + b, without an update."""
        return self.product(x, self.weight, None if bias is None else bias.detach(), None, None, 0.0)[0]

    def alone_backward(self, grad: Tensor) -> Tensor:
        """grad W0."""
        return self.gradients(grad, self.weight, grad, grad, None, None, 0.0, True, False)[0]


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

    def with_update(self, x: Tensor) -> WithUpdate | None:
        """What multiplies x (n, in) by this weight and an update of it in one product, where its device has that."""
        return None

    def row_squares(self, dtype: torch.dtype) -> Tensor:
        """Σ w² of each row of W0 (out,), summed in ``dtype`` a panel at a time."""
        sums = [torch.linalg.vector_norm(panel, dim=1).square() for _, panel in self._panels(dtype)]
        return torch.cat(sums) if sums else torch.zeros(0, dtype=dtype)

    def _panels(self, dtype: torch.dtype) -> _Panels:
        raise NotImplementedError


class DenseWeight(FrozenWeight):
    """A view of a floating-point parameter; ``transposed`` when it is stored as (in, out), as GPT-2's Conv1D keeps it.

    ``multiply``: what x of the weight's own type is multiplied by; other last bits come of another one.
    """

    def __init__(self, weight: Tensor, transposed: bool = False, multiply: Multiply = F.linear) -> None:
        self._multiply = multiply
        self._weight = weight.detach().t() if transposed else weight.detach()
        self.shape = (self._weight.shape[0], self._weight.shape[1])

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if whole := self.with_update(x):
            return whole.alone(x, bias)
        bias = None if bias is None else bias.detach().to(x.dtype)
        if x.dtype is self._weight.dtype:
            return self._multiply(x, self._weight, bias)
        y = _product(x, converted(self._weight, x.dtype), self.shape[0])
        return y if bias is None else y.add_(bias)

    def product_transposed(self, grad: Tensor) -> Tensor:
        if _adapts(grad):
            return self._whole().alone_backward(grad)
        if grad.dtype is self._weight.dtype:
            return linear(grad, self._weight.t())
        return _product_transposed(grad, converted(self._weight, grad.dtype), self.shape)

    def dense(self) -> Tensor:
        return self._weight

    def with_update(self, x: Tensor) -> WithUpdate | None:
        # Not where nn.Linear's own bits are asked for, which are those of F.linear.
        owns = self._multiply is F.linear and x.dtype is self._weight.dtype
        return self._whole() if _adapts(x) and not owns else None

    def _whole(self) -> WithUpdate:
        return WithUpdate(self._weight, product_with_update, product_with_update_backward)

    def _panels(self, dtype: torch.dtype) -> _Panels:
        return converted(self._weight, dtype)


class BlockwiseWeight(FrozenWeight):
    """A quantised weight, expanded panel by panel of rows into one buffer: no product makes a larger copy of it."""

    def __init__(
        self, quantised: Quantised, dtype: torch.dtype = torch.float32,
        few_rows: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._quantised, self._dtype, self._few_rows = quantised, dtype, few_rows
        # Asked now: an autograd function, which calls the product, switches gradients off.
        self._refuses = few_rows is not None and torch.is_grad_enabled()
        self.shape = quantised.shape

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._refuses:
            raise ModelError(
                "Activations in 8 bits are for generation: nothing is learned through them. Leave int8_activations() "
                "before a pass that needs gradients, or run this one under torch.no_grad()."
            )
        if whole := self.with_update(x):
            return whole.alone(x, bias)
        if _has_few_rows(x):
            y = self._few_rows(x) if self._few_rows is not None else few_row_product(x, self._quantised)
        else:
            y = _product(x, panels(self._quantised, x.dtype), self.shape[0])
        return y if bias is None else y.add_(bias.detach())

    def product_transposed(self, grad: Tensor) -> Tensor:
        if whole := self.with_update(grad):
            return whole.alone_backward(grad)
        return _product_transposed(grad, panels(self._quantised, grad.dtype), self.shape)

    def dense(self) -> Tensor:
        return dense(self._quantised, self._dtype)

    def with_update(self, x: Tensor) -> WithUpdate | None:
        if not _adapts(x):
            return None
        return WithUpdate(self._quantised.coded, product_with_update_coded, product_with_update_coded_backward)

    def _panels(self, dtype: torch.dtype) -> _Panels:
        return panels(self._quantised, dtype)


def _adapts(x: Tensor) -> bool:
    """Whether the device of x (n, in) multiplies it by a weight and its update in one product."""
    return backend_of(x.device.type).adapts(x.dtype) and not torch.compiler.is_compiling()


def _has_few_rows(x: Tensor) -> bool:
    """Whether the device of x (n, in) multiplies it faster by a kernel that expands the weight in registers."""
    return 1 <= x.shape[0] <= backend_of(x.device.type).few_rows(x.dtype)


def _product(x: Tensor, panels: _Panels, out: int) -> Tensor:
    """x (n, in) → x W0ᵀ (n, out)."""
    backend = backend_of(x.device.type)
    y: Tensor | None = None
    for rows, panel in panels:
        if len(panel) < out and y is None:
            y = x.new_empty(x.shape[0], out)
        part = backend.panel_product(x, panel)
        if y is None:
            return part
        y[:, rows] = part
    return x.new_empty(x.shape[0], out) if y is None else y


def _product_transposed(grad: Tensor, panels: _Panels, shape: tuple[int, int]) -> Tensor:
    """grad (n, out) → grad W0 (n, in) for W0 of ``shape``."""
    if not shape[0]:
        return grad.new_zeros(grad.shape[0], shape[1])
    backend = backend_of(grad.device.type)
    y: Tensor | None = None
    for rows, panel in panels:
        part = backend.panel_product(grad[:, rows], panel.t())
        if y is None:
            # One part is the product; of several the sum is kept in fp32 and rounded once, not once a part.
            y = part if len(panel) == shape[0] else part.to(torch.promote_types(part.dtype, torch.float32))
        else:
            y.add_(part)
    return cast(Tensor, y).to(grad.dtype)


class InCodes(nn.Module):
    """A module whose weights are in codes. ``dtype`` is the type they had, in which they are merged and given back."""

    codes: Tensor
    dtype: torch.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> InCodes:
        # model.to(bfloat16) means the compute type: the scales stay the fp32 numbers that the codes were made with.
        kept = {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype is not tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self


class QuantisedLinear(InCodes):
    """y = W0 x + b with W0 (out, in) kept in a quantised storage; frozen, differentiable in x.

    ``dtype`` is the type W0 had, in which it is merged and given back; ``transposed``: it was stored as (in, out).
    """

    codes: Tensor
    scales: Tensor
    nested_scales: Tensor | None
    offset: Tensor | None
    few_rows: Callable[[Tensor], Tensor] | None = None  # the product while int8_activations() holds

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
        return BlockwiseWeight(self.quantised, self.dtype, self.few_rows)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and self.few_rows is not None and not autocasts(x.device.type):
            rows = x.reshape(-1, x.shape[-1])
            if _has_few_rows(rows):
                y = self.few_rows(rows)  # a token at a time, where each step more is felt
                y = y if self.bias is None else y.add_(self.bias)
                return y.view(*x.shape[:-1], self.out_features)
        return frozen_product(x, self.frozen(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.storage}"


class StoredLinear(nn.Linear):
    """y = W0 x + b in the type of x, whichever W0 has; differentiable in x, and in W0 where that is trained."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return frozen_product(x, frozen_weight(self), self.bias)


class StoredConv1D(Conv1D):  # type: ignore[misc]
    """The same of GPT-2's layer, whose W0 is stored as (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.weight.t().to(x.dtype), self.bias.to(x.dtype))
        return frozen_product(x, frozen_weight(self), self.bias)


STORED = {nn.Linear: StoredLinear, Conv1D: StoredConv1D}
PLAIN_TYPES = (*STORED, *STORED.values())  # the linear layers whose weight is a floating-point parameter
# Classes of transformers that compute x W0ᵀ + b as nn.Linear does, if with other last bits.
_LIKE_LINEAR = (
    "transformers.models.falcon.modeling_falcon.FalconLinear",
    "transformers.models.esm.modeling_esmfold.EsmFoldLinear",
)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x W0ᵀ + b of a floating-point parameter and nothing else; another subclass may not."""
    kind = type(module)
    return kind in PLAIN_TYPES or f"{kind.__module__}.{kind.__qualname__}" in _LIKE_LINEAR


def frozen_product(x: Tensor, frozen: FrozenWeight, bias: Tensor | None) -> Tensor:
    """x (…, in) → x W0ᵀ + b (…, out), differentiable in x; keeps nothing for the backward pass."""
    device = x.device.type
    if autocasts(device):
        with torch.autocast(device, enabled=False):
            return frozen_product(x.to(torch.get_autocast_dtype(device)), frozen, bias)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor
    if torch.is_grad_enabled():
        y = _FrozenProduct.apply(rows, frozen, bias)  # type: ignore[no-untyped-call]
    else:
        y = frozen.product(rows, bias)
    # Not a view where none is needed: of one whose values the loss overwrites, the backward pass would make a copy.
    return y if x.dim() == 2 else y.view(*x.shape[:-1], frozen.shape[0])


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


def frozen_weight(module: nn.Module, multiply: Multiply = F.linear) -> FrozenWeight:
    """The weight of a linear layer, as it is kept; one in x's own type is multiplied by ``multiply``, with nn.Linear's
    bits unless it is another. Raises TargetError for a module that is none."""
    if isinstance(module, QuantisedLinear):
        return module.frozen()
    if isinstance(module, (nn.Linear, Conv1D)):
        return DenseWeight(cast(Tensor, module.weight), isinstance(module, Conv1D), multiply)
    raise TargetError(f"A {type(module).__name__} has no frozen weight to multiply by.")


@contextmanager
def int8_activations(model: nn.Module) -> Iterator[None]:
    """Inside, products of up to eight rows by a weight in 4 bits round their input and the table of 16 to 8 bits.

    For generation: the error is 0.7 % of a product, and a pass that needs gradients is refused. Layers whose rows are
    no multiple of 32 stay exact. `veneer.generate` then rounds the output head, too. Raises ModelError when there is no
    layer to serve.

    Example:
        >>> model, tokenizer = veneer.load("tiny", storage="nf4")
        >>> with veneer.int8_activations(model):
        ...     answers = veneer.generate(model, tokenizer, ["hello"], max_new_tokens=2)
    """
    refuse_no_model("int8_activations", model)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, QuantisedLinear) and CODE_BITS[module.storage] == 4 and module.in_features % GROUP == 0
    ]
    if not layers:
        raise ModelError("Activations in 8 bits need a base kept in 4 bits (storage nf4, fp4 or int4); this is none.")
    before = [layer.few_rows for layer in layers]
    for layer in layers:
        layer.few_rows = prepared_int8(layer.quantised)
    try:
        yield
    finally:
        for layer, few_rows in zip(layers, before, strict=True):
            layer.few_rows = few_rows
