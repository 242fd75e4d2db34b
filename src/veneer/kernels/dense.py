"""Products of dense matrices: on a CPU, fp32 ones by oneDNN rather than by the BLAS that torch was built with.

Measured on a Zen 4 CPU (`benchmarks/products.py`): a tenth faster for the layers of a small model, by half for its
output head, 1.2 to 1.9 times as fast, from day to day, for products with a side of the rank's size. The last bits are
others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.device import CPU

_HAVE_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # an operator of builds with oneDNN only
Multiply = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # what `linear` does, and F.linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, in), weight (out, in), bias (out,) → a new x weightᵀ + bias (n, out); any strides, no gradient."""
    if torch.compiler.is_compiling():  # Inductor chooses the product itself, and takes no strides in oneDNN's
        return F.linear(x, weight, bias)
    if not (_HAVE_ONEDNN and x.device.type == CPU and x.dtype == weight.dtype == torch.float32 and x.numel()):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
