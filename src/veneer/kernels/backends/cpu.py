"""The operations in C++ (csrc/): checks tensors, and passes their addresses to the extension."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from veneer.kernels.backends.flash import FlashAttention
from veneer.kernels.backends.reference import FEW, Reference
from veneer.kernels.coded import CodedWeight, Levels
from veneer.kernels.extension import VARIANTS
from veneer.kernels.operation import Kernel
from veneer.kernels.operations import (
    cross_entropy,
    gates,
    gguf_blocks,
    norm,
    products,
    products_int8,
    quantise,
    rotation,
    update,
)
from veneer.kernels.operations.products_int8 import GROUP, stride8

if VARIANTS:
    from veneer.kernels import _cpu

_IN_FP32 = FlashAttention()
_BESIDE_16_BITS = "avx512"  # the variant of processors that may have AVX-512 BF16 and no tiles
_LONGEST = 24  # rank of an update that these multiply by
_BF16 = {torch.float32: False, torch.bfloat16: True}  # what a kernel writes, and whether that is bf16


class Cpu(Reference):
    """The operations by one variant, of those in VARIANTS. What the C++ does not compute, other types and some layouts,
    the definitions do."""

    def __init__(self, variant: str) -> None:
        self.name = variant

    def kernels(self) -> tuple[Kernel, ...]:
        return (
            quantise.quantise4.by(self.quantise4),
            quantise.quantise8.by(self.quantise8),
            quantise.nearest8.by(self.nearest8),
            gguf_blocks.gguf_blocks.by(self.gguf_blocks),
            products.dequantise.by(self.dequantise),
            products.coded_product.by(self.coded_product),
            products_int8.product4_int8.by(self.product4_int8),
            products_int8.product8_int8.by(self.product8_int8),
            norm.rms_norm.by(self.rms_norm),
            norm.rms_norm_backward.by(self.rms_norm_backward),
            gates.swiglu.by(self.swiglu),
            gates.swiglu_backward.by(self.swiglu_backward),
            gates.geglu.by(self.geglu),
            gates.geglu_backward.by(self.geglu_backward),
            rotation.rotate.by(self.rotate),
            cross_entropy.cross_entropy.by(self.cross_entropy),
            cross_entropy.cross_entropy_gradient.by(self.cross_entropy_gradient),
            update.update_product.by(self.update_product),
            update.update_product_backward.by(self.update_product_backward),
            *(_IN_FP32.kernels() if self._attends_in_fp32() else ()),
        )

    def _attends_in_fp32(self) -> bool:
        return self.name == _BESIDE_16_BITS and _IN_FP32.serves()

    def attends(self, dtype: torch.dtype, dim: int) -> bool:
        return self._attends_in_fp32() and _IN_FP32.attends(dtype)

    def quantise4(self, weight: Tensor, boundaries: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
        check_shape("weight", weight, torch.float32, (weight.numel(),))
        check_shape("boundaries", boundaries, torch.float32, (15,))
        check_shape("order", order, torch.uint8, (16,))
        _check_block(block)
        codes = torch.empty((weight.numel() + 1) // 2, dtype=torch.uint8)
        absmax = torch.empty(-(-weight.numel() // block), dtype=torch.float32)
        _cpu.quantise4(
            self.name, weight.data_ptr(), weight.numel(), boundaries.data_ptr(), order.data_ptr(), block,
            codes.data_ptr(), absmax.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return codes, absmax

    def quantise8(self, weight: Tensor, boundaries: Tensor, block: int) -> tuple[Tensor, Tensor]:
        check_shape("weight", weight, torch.float32, (weight.numel(),))
        check_shape("boundaries", boundaries, torch.float32, (254,))
        _check_block(block)
        codes = torch.empty(weight.numel(), dtype=torch.uint8)
        absmax = torch.empty(-(-weight.numel() // block), dtype=torch.float32)
        _cpu.quantise8(
            self.name, weight.data_ptr(), weight.numel(), boundaries.data_ptr(), block, codes.data_ptr(),
            absmax.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return codes, absmax

    def nearest8(self, values: Tensor, boundaries: Tensor) -> Tensor:
        check_shape("values", values, torch.float32, values.shape)
        check_shape("boundaries", boundaries, torch.float32, (255,))
        codes = torch.empty(values.shape, dtype=torch.uint8)
        _cpu.nearest8(
            self.name, values.data_ptr(), values.numel(), boundaries.data_ptr(), codes.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return codes

    def gguf_blocks(self, values: Tensor, kind: str) -> Tensor:
        bits, least = form = gguf_blocks.KINDS[kind]
        check_shape("values", values, torch.float32, values.shape)
        blocks, rest = divmod(values.shape[-1], gguf_blocks.BLOCK)
        if rest:
            raise ValueError(f"Rows of {values.shape[-1]} values are not in blocks of {gguf_blocks.BLOCK}.")
        made = torch.empty(*values.shape[:-1], blocks * form.size, dtype=torch.uint8)
        _cpu.round_blocks(
            self.name, values.data_ptr(), values.numel() // gguf_blocks.BLOCK, bits, least, made.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return made

    def dequantise(self, weight: CodedWeight, first: int, out: Tensor) -> None:
        height, columns = out.shape
        if columns != weight.columns or not 0 <= first <= first + height <= weight.rows:
            raise ValueError(
                f"Rows {first} to {first + height} of {columns} columns are not in a weight of {weight.rows} × "
                f"{weight.columns}."
            )
        into = out if out.dtype in _BF16 and out.is_contiguous() else torch.empty(out.shape)
        start, stop = first * columns, (first + height) * columns
        kernel: Callable[..., None] = _cpu.dequantise8 if weight.table is None else _cpu.dequantise4
        kernel(
            self.name, *coded_addresses(weight, stop), start, stop, into.data_ptr(), _BF16[into.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        if into is not out:
            out.copy_(into)

    def coded_product(self, x: Tensor, weight: CodedWeight) -> Tensor:
        rows, columns = weight.rows, weight.columns
        addresses = coded_addresses(weight, rows * columns)
        tokens = _tokens_of(x := x.contiguous(), columns)
        y = torch.empty(tokens, rows)
        kernel: Callable[..., None] = _cpu.product8 if weight.table is None else _cpu.product4
        kernel(self.name, x.data_ptr(), tokens, *addresses, rows, columns, y.data_ptr(), torch.get_num_threads())
        return y

    def product4_int8(self, x: Tensor, weight: CodedWeight, levels: Tensor, step: float) -> Tensor:
        return self.prepared_int8(weight, Levels(levels, step))(x)

    def prepared_int8(self, weight: CodedWeight, levels: Levels) -> Callable[[Tensor], Tensor]:
        rows, columns = weight.rows, weight.columns
        check_levels(levels, columns)
        check("codes", weight.codes, torch.uint8, (rows * columns + 1) // 2)
        scales = _scales(weight, rows * columns)
        addresses = (weight.codes.data_ptr(), levels.values.data_ptr(), levels.step, *scales, rows, columns)

        def product(x: Tensor, _: object = (weight, levels)) -> Tensor:  # alive as long as their addresses are used
            tokens = _tokens_of(x := x.contiguous(), columns)
            y = torch.empty(tokens, rows)
            _cpu.product4_int8(self.name, x.data_ptr(), tokens, *addresses, y.data_ptr(), torch.get_num_threads())
            return y

        return product

    def product8_int8(self, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        columns = x.shape[1]
        tokens = _tokens_of(x := x.contiguous(), columns)
        check_groups(columns)
        check_shape("scales", scales, torch.float32, (len(scales),))
        check_shape("codes", codes, torch.uint8, (len(scales), 2, stride8(columns)))
        y = torch.empty(tokens, len(scales))
        _cpu.product8_int8(
            self.name, x.data_ptr(), tokens, codes.data_ptr(), scales.data_ptr(), len(scales), columns, y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, once: bool) -> tuple[Tensor, Tensor]:
        if not (_served(x) and _served(weight)):
            return norm.rms_norm.definition(x, weight, eps, once)
        x, weight = x.contiguous(), weight.float().contiguous()
        check_shape("weight", weight, torch.float32, x.shape[-1:])
        y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        _cpu.rms_norm(
            self.name, x.data_ptr(), weight.data_ptr(), eps, once, inverse.numel(), x.shape[-1], y.data_ptr(),
            inverse.data_ptr(), _BF16[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return y, inverse

    def rms_norm_backward(self, grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, once: bool) -> Tensor:
        if not (_served(grad, x) and _served(weight) and _fp32(inverse)):
            return norm.rms_norm_backward.definition(grad, x, inverse, weight, once)
        grad, x, inverse, weight = (tensor.contiguous() for tensor in (grad, x, inverse, weight.float()))
        check_shape("grad", grad, x.dtype, x.shape)
        check_shape("inverse", inverse, torch.float32, (*x.shape[:-1], 1))
        check_shape("weight", weight, torch.float32, x.shape[-1:])
        out = torch.empty_like(x)
        _cpu.rms_norm_backward(
            self.name, grad.data_ptr(), x.data_ptr(), inverse.data_ptr(), weight.data_ptr(), once, inverse.numel(),
            x.shape[-1], out.data_ptr(), _BF16[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._gated(gate, up, False) if _served(gate, up) else gates.swiglu.definition(gate, up)

    def geglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._gated(gate, up, True) if _served(gate, up) else gates.geglu.definition(gate, up)

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if not _served(grad, gate, up):
            return gates.swiglu_backward.definition(grad, gate, up)
        return self._gated_backward(grad, gate, up, False)

    def geglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if not _served(grad, gate, up):
            return gates.geglu_backward.definition(grad, gate, up)
        return self._gated_backward(grad, gate, up, True)

    def _gated(self, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        check_shape("up", up, gate.dtype, gate.shape)
        y = torch.empty_like(gate)
        _cpu.gated(
            self.name, gate.data_ptr(), up.data_ptr(), gate.numel(), gelu, y.data_ptr(), _BF16[gate.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def _gated_backward(self, grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
        grad, gate, up = (tensor.contiguous() for tensor in (grad, gate, up))
        check_shape("up", up, gate.dtype, gate.shape)
        check_shape("grad", grad, gate.dtype, gate.shape)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _cpu.gated_backward(
            self.name, grad.data_ptr(), gate.data_ptr(), up.data_ptr(), gate.numel(), gelu, grad_gate.data_ptr(),
            grad_up.data_ptr(), _BF16[gate.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return grad_gate, grad_up

    def cross_entropy(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        if not _served(logits):
            return cross_entropy.cross_entropy.definition(logits, labels, smoothing)
        return self._cross_entropy(logits.contiguous(), labels, smoothing, False)

    def cross_entropy_gradient(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        if not (_served(logits) and logits.is_contiguous()):
            return cross_entropy.cross_entropy_gradient.definition(logits, labels, smoothing)
        return self._cross_entropy(logits, labels, smoothing, True)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, smoothing: float, gradient: bool) -> Tensor:
        rows, width = logits.shape
        labels = labels.contiguous()
        check_shape("labels", labels, torch.int64, (rows,))
        losses = logits.new_empty(rows, dtype=torch.float64)
        _cpu.cross_entropy(
            self.name, logits.data_ptr(), labels.data_ptr(), rows, width, smoothing, gradient, losses.data_ptr(),
            _BF16[logits.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return losses

    def update_product(self, x: Tensor, A: Tensor, B: Tensor, scale: float, y: Tensor) -> Tensor:
        if not (_short(A) and _fp32(x, A, B, y) and y.is_contiguous()):
            return update.update_product.definition(x, A, B, scale, y)
        x, A, B = x.contiguous(), A.contiguous(), B.contiguous()
        (tokens, into), (rank, out) = x.shape, B.shape[::-1]
        check_shape("A", A, torch.float32, (rank, into))
        check_shape("y", y, torch.float32, (tokens, out))
        low = x.new_empty(tokens, rank)
        _cpu.update_product(
            self.name, x.data_ptr(), A.data_ptr(), B.data_ptr(), scale, tokens, into, out, rank, low.data_ptr(),
            y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return low

    def update_product_backward(
        self, grad: Tensor, x: Tensor, low: Tensor, A: Tensor, B: Tensor, scale: float, grad_x: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not (_short(A) and _fp32(grad, x, low, A, B) and (grad_x is None or grad_x.is_contiguous())):
            return update.update_product_backward.definition(grad, x, low, A, B, scale, grad_x)
        grad, x, low, A, B = (tensor.contiguous() for tensor in (grad, x, low, A, B))
        (tokens, into), (rank, out) = x.shape, B.shape[::-1]
        check_shape("A", A, torch.float32, (rank, into))
        check_shape("grad", grad, torch.float32, (tokens, out))
        check_shape("low", low, torch.float32, (tokens, rank))
        if grad_x is not None:
            check_shape("grad_x", grad_x, torch.float32, (tokens, into))
        grad_A, grad_B = torch.empty_like(A), torch.empty_like(B)
        _cpu.update_product_backward(
            self.name, grad.data_ptr(), x.data_ptr(), low.data_ptr(), A.data_ptr(), B.data_ptr(), scale, tokens, into,
            out, rank, 0 if grad_x is None else grad_x.data_ptr(), grad_A.data_ptr(), grad_B.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_A, grad_B

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool) -> Tensor:
        if not _served(x, cosines, sines):
            return rotation.rotate.definition(x, cosines, sines, transposed)
        batch, heads, tokens, dim = x.shape
        x = x if x.stride(3) == 1 else x.contiguous()
        cosines, sines = cosines.contiguous(), sines.contiguous()
        if dim % 2:
            raise ValueError(f"Halves are rotated, and {dim} has none.")
        check_shape("cosines", cosines, x.dtype, (batch if len(cosines) != 1 else 1, tokens, dim))
        check_shape("sines", sines, x.dtype, cosines.shape)
        out = x.new_empty(batch, tokens, heads, dim)
        _cpu.rotate(
            self.name, x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), cosines.data_ptr(), sines.data_ptr(),
            len(cosines) == 1, batch, heads, tokens, dim, transposed, out.data_ptr(), _BF16[x.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        return out.transpose(1, 2)


def _served(*tensors: Tensor) -> bool:
    """Whether they are of one type, one that the passes are written for, and hold anything."""
    return all(tensor.dtype is tensors[0].dtype and tensor.numel() for tensor in tensors) and tensors[0].dtype in _BF16


def _fp32(*tensors: Tensor) -> bool:
    return all(tensor.dtype is torch.float32 and tensor.numel() for tensor in tensors)


def _short(A: Tensor) -> bool:
    """Whether the rank is one for which the update's own kernels are the faster ones (`benchmarks/products.py`)."""
    return A.shape[0] <= _LONGEST


def coded_addresses(weight: CodedWeight, elements: int) -> tuple[int, ...]:
    """A weight of at least ``elements``, as the extension takes it: codes, in 4 bits the table, scales, nested table,
    nested scales, offset, block, and the power of two of the nested block. Raises ValueError when a tensor is not as it
    must be, because nothing behind this looks again."""
    if weight.table is None:
        check("codes", weight.codes, torch.uint8, elements)
        return weight.codes.data_ptr(), *_scales(weight, elements)
    check("codes", weight.codes, torch.uint8, (elements + 1) // 2)
    check("table", weight.table, torch.float32, 16)
    return weight.codes.data_ptr(), weight.table.data_ptr(), *_scales(weight, elements)


def _scales(weight: CodedWeight, elements: int) -> tuple[int, int, int, int, int, int]:
    """The scales of at least ``elements``, and the blocks."""
    scales, nested_table, nested_scales, offset, block, nested_block = weight[2:8]
    _check_block(block)
    blocks = -(-elements // block)
    if nested_table is None or nested_scales is None or offset is None:
        check("scales", scales, torch.float32, blocks)
        return scales.data_ptr(), 0, 0, 0, block, 0
    if nested_block < 1 or nested_block & (nested_block - 1):
        raise ValueError(f"A block of scales is a power of two, not {nested_block}.")
    check("scales", scales, torch.uint8, blocks)
    check("nested_table", nested_table, torch.float32, 256)
    check("nested_scales", nested_scales, torch.float32, -(-blocks // nested_block))
    check("offset", offset, torch.float32, 1)
    return (
        scales.data_ptr(), nested_table.data_ptr(), nested_scales.data_ptr(), offset.data_ptr(), block,
        nested_block.bit_length() - 1,
    )  # fmt: skip


def check(name: str, tensor: Tensor, dtype: torch.dtype, least: int) -> None:
    if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous() or tensor.numel() < least:
        raise ValueError(
            f"{name} must be {dtype}, contiguous, on the CPU and of at least {least} elements, "
            f"not {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}."
        )


def check_shape(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {tuple(shape)}, not {tuple(tensor.shape)}.")
    check(name, tensor, dtype, 0)


def _tokens_of(x: Tensor, columns: int) -> int:
    """The rows of ``x`` (tokens, columns), which a product of few rows takes."""
    tokens = x.shape[0]
    if not 1 <= tokens <= FEW:
        raise ValueError(f"The few-token product takes 1 to {FEW} rows of x, not {tokens}.")
    check_shape("x", x, torch.float32, (tokens, columns))
    return tokens


def check_levels(levels: Levels, columns: int) -> None:
    check_groups(columns)
    check("levels", levels.values, torch.int8, 16)


def check_groups(columns: int) -> None:
    if columns % GROUP:
        raise ValueError(f"The product in 8 bits takes a multiple of {GROUP} columns, not {columns}.")


def _check_block(block: int) -> None:
    if block < 32 or block % 32:
        raise ValueError(f"A block is a multiple of 32 elements, not {block}.")
