"""What AMX adds to the operations in C++: products and attention in bf16 by tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.kernels.backends.cpu import Cpu, check_shape, coded_addresses
from veneer.kernels.backends.tiled_attention import TiledAttention
from veneer.kernels.coded import CodedWeight
from veneer.kernels.extension import VARIANTS
from veneer.kernels.operation import Kernel
from veneer.kernels.operations import adapted
from veneer.kernels.operations.adapted import Gradients, Product

if VARIANTS:
    from veneer.kernels import _cpu

_KINDS = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}  # as `Weight16` numbers them
_ATTENTION = TiledAttention()
_LONGEST = 512  # rank
_LINE = 64  # bytes of a cache line


class _Frozen(NamedTuple):
    """A weight (out, in) as the extension takes it."""

    made: Any  # a Weight16
    transposed: bool  # kept as (in, out)
    out: int
    into: int
    kept: Tensor | CodedWeight  # alive as long as its address is used


class Tiles(Cpu):
    """The operations by a variant that has tiles."""

    def kernels(self) -> tuple[Kernel, ...]:
        return (
            *super().kernels(),
            adapted.product_with_update.by(self.product_with_update),
            adapted.product_with_update_backward.by(self.product_with_update_backward),
            adapted.product_with_update_coded.by(self.product_with_update_coded),
            adapted.product_with_update_coded_backward.by(self.product_with_update_coded_backward),
            *_ATTENTION.kernels(),
        )

    def attends(self, dtype: torch.dtype, dim: int) -> bool:
        return _ATTENTION.attends(dtype, dim)

    def adapts(self, dtype: torch.dtype) -> bool:
        return dtype is torch.bfloat16

    def product_with_update(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float
    ) -> Product:
        if not _fit(x, A):
            return adapted.product_with_update.definition(x, weight, bias, A, B, scale)
        return self._product(x, _dense(weight), bias, A, B, scale)

    def product_with_update_coded(
        self, x: Tensor, weight: CodedWeight, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float
    ) -> Product:
        if not _fit(x, A):
            return adapted.product_with_update_coded.definition(x, weight, bias, A, B, scale)
        return self._product(x, _coded(weight), bias, A, B, scale)

    def product_with_update_backward(
        self, grad: Tensor, weight: Tensor, x: Tensor, low: Tensor, A: Tensor | None, B: Tensor | None, scale: float,
        wants_x: bool, wants_update: bool,
    ) -> Gradients:  # fmt: skip
        if not _fit(grad, A):
            return adapted.product_with_update_backward.definition(
                grad, weight, x, low, A, B, scale, wants_x, wants_update
            )
        return self._gradients(grad, _dense(weight), x, low, A, B, scale, wants_x, wants_update)

    def product_with_update_coded_backward(
        self, grad: Tensor, weight: CodedWeight, x: Tensor, low: Tensor, A: Tensor | None, B: Tensor | None,
        scale: float, wants_x: bool, wants_update: bool,
    ) -> Gradients:  # fmt: skip
        if not _fit(grad, A):
            by_definition = adapted.product_with_update_coded_backward.definition
            return by_definition(grad, weight, x, low, A, B, scale, wants_x, wants_update)
        return self._gradients(grad, _coded(weight), x, low, A, B, scale, wants_x, wants_update)

    def _product(
        self, x: Tensor, weight: _Frozen, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float
    ) -> Product:
        x = x.contiguous()
        check_shape("x", x, torch.bfloat16, (len(x), weight.into))
        bias = None if bias is None else bias.float().contiguous()
        if bias is not None:
            check_shape("bias", bias, torch.float32, (weight.out,))
        rank, A, B = _update(A, B, weight)
        y, low = x.new_empty(len(x), weight.out), x.new_empty(len(x), rank)
        room, threads = self._room(len(x), weight, rank)
        _cpu.adapted(
            self.name, x.data_ptr(), len(x), weight.made, weight.transposed, _address(bias), _address(A), _address(B),
            rank, scale, low.data_ptr(), y.data_ptr(), _line(room), threads,
        )  # fmt: skip
        return y, low

    def _gradients(
        self, grad: Tensor, weight: _Frozen, x: Tensor, low: Tensor, A: Tensor | None, B: Tensor | None, scale: float,
        wants_x: bool, wants_update: bool,
    ) -> Gradients:  # fmt: skip
        grad = grad.contiguous()
        check_shape("grad", grad, torch.bfloat16, (len(grad), weight.out))
        rank, A, B = _update(A, B, weight)
        if wants_update and rank:
            x, low = x.contiguous(), low.contiguous()
            check_shape("x", x, torch.bfloat16, (len(grad), weight.into))
            check_shape("low", low, torch.bfloat16, (len(grad), rank))
        grad_x, grad_A, grad_B = adapted.room_for_gradients(grad, weight.into, A, B, wants_x, wants_update)
        room, threads = self._room(len(grad), weight, rank)
        _cpu.adapted_backward(
            self.name, grad.data_ptr(), x.data_ptr(), len(grad), weight.made, weight.transposed, _address(A),
            _address(B), rank, scale, low.data_ptr(), _address(grad_x), _address(grad_A), _address(grad_B),
            _line(room), threads,
        )  # fmt: skip
        return grad_x, grad_A, grad_B

    def _room(self, tokens: int, weight: _Frozen, rank: int) -> tuple[Tensor, int]:
        """Where a product is computed, and by how many threads."""
        threads = torch.get_num_threads()
        size = _cpu.adapted_room(self.name, tokens, weight.made, weight.transposed, rank, threads)
        return torch.empty(size + _LINE, dtype=torch.uint8), threads


def _line(room: Tensor) -> int:
    """The address of its first cache line."""
    return -(-room.data_ptr() // _LINE) * _LINE


def _fit(x: Tensor, A: Tensor | None) -> bool:
    """Whether the tiles take rows of this type, and an update of this rank."""
    return x.dtype is torch.bfloat16 and x.numel() > 0 and (A is None or 0 < len(A) <= _LONGEST)


def _dense(weight: Tensor) -> _Frozen:
    """One whose rows or columns are dense; another one is copied."""
    if weight.dtype not in _KINDS:
        weight = weight.to(torch.bfloat16)
    transposed = weight.stride(1) != 1 and weight.stride(0) == 1
    kept = weight.t() if transposed else weight
    kept = kept if kept.stride(1) == 1 else kept.contiguous()
    (rows, columns), kind = kept.shape, _KINDS[kept.dtype]
    made = _cpu.Weight16.dense(kind, kept.data_ptr(), rows, columns, kept.stride(0))
    return _Frozen(made, transposed, weight.shape[0], weight.shape[1], kept)


def _coded(weight: CodedWeight) -> _Frozen:
    make: Callable[..., Any] = _cpu.Weight16.int8 if weight.table is None else _cpu.Weight16.four_bits
    made = make(*coded_addresses(weight, weight.rows * weight.columns), weight.rows, weight.columns)
    return _Frozen(made, False, weight.rows, weight.columns, weight)


def _update(A: Tensor | None, B: Tensor | None, weight: _Frozen) -> tuple[int, Tensor | None, Tensor | None]:
    """The rank, 0 where there is no update, and its factors as the extension takes them."""
    if A is None or B is None:
        return 0, None, None
    rank = len(A)
    A, B = A.float().contiguous(), B.float().contiguous()
    check_shape("A", A, torch.float32, (rank, weight.into))
    check_shape("B", B, torch.float32, (weight.out, rank))
    return rank, A, B


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()
