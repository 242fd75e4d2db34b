"""The operations in Triton (kernels/triton/), for CUDA and ROCm. Triton is imported with the first tensor on such a
device, not with this file."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.backends.reference import Reference
from veneer.kernels.coded import CodedWeight
from veneer.kernels.operation import Kernel
from veneer.kernels.operations import adapted, cross_entropy, gates, norm, products, quantise, rotation

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
        from veneer.kernels.triton.quantise import quantise4

        return quantise4(weight, boundaries, order, block)

    def quantise8(self, weight: Tensor, boundaries: Tensor, block: int) -> tuple[Tensor, Tensor]:
        from veneer.kernels.triton.quantise import quantise8

        return quantise8(weight, boundaries, block)

    def nearest8(self, values: Tensor, boundaries: Tensor) -> Tensor:
        from veneer.kernels.triton.quantise import nearest8

        return nearest8(values, boundaries)

    def dequantise(self, weight: CodedWeight, first: int, out: Tensor) -> None:
        from veneer.kernels.triton.expand import dequantise

        dequantise(weight, first, out)

    def coded_product(self, x: Tensor, weight: CodedWeight) -> Tensor:
        from veneer.kernels.triton.few_rows import coded_product

        return coded_product(x, weight)

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
        from veneer.kernels.triton.norm import rms_norm

        return rms_norm(x, weight, eps, once)

    def rms_norm_backward(self, grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, once: bool) -> Tensor:
        from veneer.kernels.triton.norm import rms_norm_backward

        return rms_norm_backward(grad, x, inverse, weight, once)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        from veneer.kernels.triton.gates import swiglu

        return swiglu(gate, up)

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        from veneer.kernels.triton.gates import swiglu_backward

        return swiglu_backward(grad, gate, up)

    def geglu(self, gate: Tensor, up: Tensor) -> Tensor:
        from veneer.kernels.triton.gates import geglu

        return geglu(gate, up)

    def geglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        from veneer.kernels.triton.gates import geglu_backward

        return geglu_backward(grad, gate, up)

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool) -> Tensor:
        from veneer.kernels.triton.rotation import rotate

        return rotate(x, cosines, sines, transposed)

    def cross_entropy(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        from veneer.kernels.triton.cross_entropy import cross_entropy

        return cross_entropy(logits, labels, smoothing)

    def cross_entropy_gradient(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        from veneer.kernels.triton.cross_entropy import cross_entropy_gradient

        return cross_entropy_gradient(logits, labels, smoothing)
