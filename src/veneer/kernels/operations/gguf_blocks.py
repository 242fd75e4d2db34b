"""Numbers to the blocks in which a GGUF file keeps them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels.operation import operation

BLOCK = 32


class Kind(NamedTuple):
    """How a block is kept: the step between its codes in fp16, the least number in fp16 where codes count from it, and
    a code of so many bits for each number."""

    bits: int
    least: bool = False

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return 2 + 2 * self.least + BLOCK * self.bits // 8


KINDS = {"Q8_0": Kind(8), "Q4_0": Kind(4), "Q4_1": Kind(4, least=True), "Q5_0": Kind(5), "Q5_1": Kind(5, least=True)}


def _fake_gguf_blocks(values: Tensor, kind: str) -> Tensor:
    return values.new_empty(*values.shape[:-1], values.shape[-1] // BLOCK * KINDS[kind].size, dtype=torch.uint8)


@operation("(Tensor values, str kind) -> Tensor", fake=_fake_gguf_blocks)
def gguf_blocks(values: Tensor, kind: str) -> Tensor:
    """The bytes, uint8, of ``values`` (…, columns) fp32 kept as ``kind``, one of KINDS, a row's blocks one after
    another; columns are a multiple of 32. A block's NaN or infinity is in its step; its codes then mean nothing."""
    import gguf
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        made = gguf.quantize(values.cpu().numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(made).to(values.device)
