"""The backend of every device that has no other: each operation by its definition, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels.coded import CodedWeight, Levels
from veneer.kernels.dense import linear
from veneer.kernels.operation import Kernel
from veneer.kernels.operations.products_int8 import product4_int8

FEW = 8  # rows of x
_MANY = 32  # rows of x from which it pays that oneDNN reorders a panel


class Reference:
    """See `Backend`."""

    name = "reference"

    def kernels(self) -> tuple[Kernel, ...]:
        return ()

    def few_rows(self, dtype: torch.dtype) -> int:
        return FEW if dtype is torch.float32 else 0

    def adapts(self, dtype: torch.dtype) -> bool:
        return False

    def attends(self, dtype: torch.dtype, dim: int) -> bool:
        return False

    def panel_product(self, x: Tensor, panel: Tensor) -> Tensor:
        return (linear if len(x) >= _MANY else F.linear)(x, panel)

    def prepared_int8(self, weight: CodedWeight, levels: Levels) -> Callable[[Tensor], Tensor]:
        return lambda x: product4_int8.definition(x, weight, *levels)
