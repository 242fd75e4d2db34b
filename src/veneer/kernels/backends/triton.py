"""The operations in Triton (kernels/triton/), for CUDA and ROCm. Triton is imported with the first tensor on such a
device, not with this file."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.backends.reference import Reference
from veneer.kernels.coded import CodedWeight
from veneer.kernels.operation import Kernel
from veneer.kernels.operations import (
    adamw,
    adapted,
    cross_entropy,
    gates,
    norm,
    products,
    quantise,
    residual_norm,
    rotation,
)

_IN_16_BITS = (torch.bfloat16, torch.float16)
_FEW = 16  # rows of x, as in kernels/triton/few_rows.py


class Triton(Reference):
    """What the kernels do not compute, other types and some layouts, the definitions do. In 16 bits a whole weight is
    expanded at once, and cuBLAS multiplies by it (`product_with_update_coded`); a few rows of x never expand it."""

    name = "triton"

    def kernels(self) -> tuple[Kernel, ...]:
        return (
            quantise.quantise4.by(self.quantise4),
            quantise.quantise8.by(self.quantise8),
            quantise.nearest8.by(self.nearest8),
            products.dequantise.by(self.dequantise),
            products.coded_product.by(self.coded_product),
            adapted.product_with_update_coded.by(self.product_with_update_coded),
            norm.rms_norm.by(self.rms_norm),
            norm.rms_norm_backward.by(self.rms_norm_backward),
            residual_norm.add_rms_norm.by(self.add_rms_norm),
            residual_norm.add_rms_norm_backward.by(self.add_rms_norm_backward),
            adamw.adamw.by(self.adamw),
            gates.swiglu.by(self.swiglu),
            gates.swiglu_backward.by(self.swiglu_backward),
            gates.geglu.by(self.geglu),
            gates.geglu_backward.by(self.geglu_backward),
            rotation.rotate.by(self.rotate),
            cross_entropy.cross_entropy.by(self.cross_entropy),
            cross_entropy.cross_entropy_gradient.by(self.cross_entropy_gradient),
        )

    def few_rows(self, dtype: torch.dtype) -> int:
        return _FEW if dtype is torch.float32 or dtype in _IN_16_BITS else 0

    def adapts(self, dtype: torch.dtype) -> bool:
        return dtype in _IN_16_BITS

    def panel_product(self, x: Tensor, panel: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, panel)

    def quantise4(self, weight: Tensor, boundaries: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
        from veneer.kernels.triton.quantise import triton_quantise4

        return triton_quantise4(weight, boundaries, order, block)

    def quantise8(self, weight: Tensor, boundaries: Tensor, block: int) -> tuple[Tensor, Tensor]:
        from veneer.kernels.triton.quantise import triton_quantise8

        return triton_quantise8(weight, boundaries, block)

    def nearest8(self, values: Tensor, boundaries: Tensor) -> Tensor:
        from veneer.kernels.triton.quantise import triton_nearest8

        return triton_nearest8(values, boundaries)

    def dequantise(self, weight: CodedWeight, first: int, out: Tensor) -> None:
        from veneer.kernels.triton.expand import triton_dequantise

        triton_dequantise(weight, first, out)

    def coded_product(self, x: Tensor, weight: CodedWeight) -> Tensor:
        from veneer.kernels.triton.few_rows import triton_coded_product

        return triton_coded_product(x, weight)

    def product_with_update_coded(
        self, x: Tensor, weight: CodedWeight, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if not 1 <= len(x) <= _FEW:
            return adapted.product_with_update_coded.definition(x, weight, bias, A, B, scale)
        y = self.coded_product(x, weight)
        if bias is not None:
            y += bias
        if A is None or B is None:
            return y, x.new_empty(len(x), 0)
        low = torch.nn.functional.linear(x, A.to(x.dtype))
        return y.addmm_(low, (scale * B).to(x.dtype).t()), low

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, once: bool) -> tuple[Tensor, Tensor]:
        from veneer.kernels.triton.norm import triton_rms_norm

        return triton_rms_norm(x, weight, eps, once)

    def rms_norm_backward(self, grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, once: bool) -> Tensor:
        from veneer.kernels.triton.norm import triton_rms_norm_backward

        return triton_rms_norm_backward(grad, x, inverse, weight, once)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, once: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        from veneer.kernels.triton.norm import triton_add_rms_norm

        return triton_add_rms_norm(x, residual, weight, eps, once)

    def add_rms_norm_backward(
        self, grad: Tensor, grad_total: Tensor, total: Tensor, inverse: Tensor, weight: Tensor, once: bool
    ) -> Tensor:
        from veneer.kernels.triton.norm import triton_add_rms_norm_backward

        return triton_add_rms_norm_backward(grad, grad_total, total, inverse, weight, once)

    def adamw(
        self, values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float, beta1: float, beta2: float,
        eps: float, decay: float, step: int,
    ) -> None:  # fmt: skip
        from veneer.kernels.triton.adamw import triton_adamw

        triton_adamw(values, gradient, mean, square, rate, beta1, beta2, eps, decay, step)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        from veneer.kernels.triton.gates import triton_swiglu

        return triton_swiglu(gate, up)

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        from veneer.kernels.triton.gates import triton_swiglu_backward

        return triton_swiglu_backward(grad, gate, up)

    def geglu(self, gate: Tensor, up: Tensor) -> Tensor:
        from veneer.kernels.triton.gates import triton_geglu

        return triton_geglu(gate, up)

    def geglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        from veneer.kernels.triton.gates import triton_geglu_backward

        return triton_geglu_backward(grad, gate, up)

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool) -> Tensor:
        from veneer.kernels.triton.rotation import triton_rotate

        return triton_rotate(x, cosines, sines, transposed)

    def cross_entropy(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        from veneer.kernels.triton.cross_entropy import triton_cross_entropy

        return triton_cross_entropy(logits, labels, smoothing)

    def cross_entropy_gradient(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        from veneer.kernels.triton.cross_entropy import triton_cross_entropy_gradient

        return triton_cross_entropy_gradient(logits, labels, smoothing)
