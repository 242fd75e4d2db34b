"""Attention in bf16 where the processor has AVX-512 BF16 and no tiles: torch's, in fp32.

torch's own in bf16 multiplies block by block, and each block's product costs as much as a short row's attention; over
fp32 copies, which are gone after the call, it takes from a tenth of the time, for short rows, to the same for long
ones, and only results are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from veneer.device import has_avx512_bf16
from veneer.kernels.operation import Kernel
from veneer.kernels.operations import attention
from veneer.kernels.operations.attention import check_outcome, check_rows

_aten = torch.ops.aten


class FlashAttention:
    """`attention` and its gradients in bf16 by torch's in fp32; of other types by the definition."""

    @staticmethod
    def serves() -> bool:
        """Whether this processor is one of those."""
        return has_avx512_bf16()

    def kernels(self) -> tuple[Kernel, ...]:
        return attention.attention.by(self.attend), attention.attention_backward.by(self.attend_backward)

    def attends(self, dtype: torch.dtype) -> bool:
        """Whether `attend` computes attention of this type, and not the definition."""
        return dtype is torch.bfloat16

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, causal: bool, window: int
    ) -> tuple[Tensor, Tensor]:
        if not _served(query, key, value):
            return attention.attention.definition(query, key, value, lengths, scaling, causal, window)
        check_rows(query, key, value, lengths, causal, window)
        tokens, heads, _ = query.shape
        out, lse = query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=torch.float32)
        for count, length, first, last in _groups(lengths):
            q, k, v = (_batch(x[first:last], count, heads) for x in (query, key, value))
            y, sums = _aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, _plain(causal, window, length), attn_mask=_mask(causal, window, length), scale=scaling
            )
            out[first:last] = y.transpose(1, 2).flatten(0, 1)
            lse[:, first:last] = sums.transpose(0, 1).flatten(1)
        return out, lse

    def attend_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, lengths: list[int],
        scaling: float, causal: bool, window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if not _served(query, key, value):
            return attention.attention_backward.definition(
                grad, query, key, value, out, lse, lengths, scaling, causal, window
            )
        check_rows(query, key, value, lengths, causal, window)
        check_outcome(grad, out, lse, query)
        heads = query.shape[1]
        grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        for count, length, first, last in _groups(lengths):
            g, q, k, v, y = (_batch(x[first:last], count, heads) for x in (grad, query, key, value, out))
            lse_of = lse[:, first:last].view(heads, count, length).transpose(0, 1)
            made = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, y, lse_of, 0.0, _plain(causal, window, length), attn_mask=_mask(causal, window, length),
                scale=scaling,
            )  # fmt: skip
            for into, of_batch in zip(grads, made, strict=True):
                # Keys and values get the sum over the query heads that share them.
                sums = of_batch.view(count, into.shape[1], -1, *of_batch.shape[2:]).sum(2)
                into[first:last] = sums.transpose(1, 2).flatten(0, 1)
        return grads


def _served(*tensors: Tensor) -> bool:
    return all(x.dtype is torch.bfloat16 and x.numel() for x in tensors)


def _groups(lengths: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Neighbours of one length: how many, the length, their first token and the one after their last."""
    first = 0
    for length, same in groupby(lengths):
        count = len(list(same))
        if length:
            yield count, length, first, first + count * length
        first += count * length


def _batch(x: Tensor, count: int, heads: int) -> Tensor:
    """(count · length, some heads, dim) → fp32 (count, heads, length, dim)."""
    dense = x.to(torch.float32, memory_format=torch.contiguous_format)  # other strides of dim torch reads wrongly
    rows = dense.view(count, -1, *x.shape[1:]).transpose(1, 2)
    return rows.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else rows


def _plain(causal: bool, window: int, length: int) -> bool:
    """Whether attention is causal, and no window narrower than the row."""
    return causal and not 0 < window < length


def _mask(causal: bool, window: int, length: int) -> Tensor | None:
    if not causal or _plain(causal, window, length):
        return None
    place = torch.arange(length)
    distance = place[:, None] - place
    return torch.zeros(length, length).masked_fill_((distance < 0) | (distance >= window), float("-inf"))
