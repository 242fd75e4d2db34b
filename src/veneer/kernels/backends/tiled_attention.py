"""The operations that the C++ computes by AMX tiles, in bf16: checks tensors, and passes their addresses on."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.extension import VARIANTS
from veneer.kernels.operation import Kernel
from veneer.kernels.operations import attention
from veneer.kernels.operations.attention import check_outcome, check_rows

if VARIANTS:
    from veneer.kernels import _cpu

_Heads = tuple[int, int, int]  # as the extension takes them
_WIDEST = 256  # dimensions of a head


class TiledAttention:
    """`attention` and its gradients by tiles; of what these do not take, by the definition."""

    def kernels(self) -> tuple[Kernel, ...]:
        return attention.attention.by(self.attend), attention.attention_backward.by(self.attend_backward)

    def attends(self, dtype: torch.dtype, dim: int) -> bool:
        """Whether `attend` computes attention of this type by heads of so many dimensions, and not the definition."""
        return _takes(dtype, dim)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, causal: bool, window: int
    ) -> tuple[Tensor, Tensor]:
        if not _served(query, key, value, scaling):
            return attention.attention.definition(query, key, value, lengths, scaling, causal, window)
        check_rows(query, key, value, lengths, causal, window)
        tokens, heads, dim = query.shape
        out, lse = query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=torch.float32)
        query, key, value = (_dense(x) for x in (query, key, value))
        _cpu.attention(
            _heads(query), _heads(key), _heads(value), lengths, heads, key.shape[1], dim, scaling, causal, window,
            out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out, lse

    def attend_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, lengths: list[int],
        scaling: float, causal: bool, window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if not _served(query, key, value, scaling):
            return attention.attention_backward.definition(
                grad, query, key, value, out, lse, lengths, scaling, causal, window
            )
        check_rows(query, key, value, lengths, causal, window)
        check_outcome(grad, out, lse, query)
        lse = lse.contiguous()
        grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        grad, query, key, value, out = (_dense(x) for x in (grad, query, key, value, out))
        of_query, of_key, of_value = grads
        _cpu.attention_backward(
            _heads(grad), _heads(query), _heads(key), _heads(value), _heads(out), lse.data_ptr(), lengths,
            query.shape[1], key.shape[1], query.shape[2], scaling, causal, window, of_query.data_ptr(),
            of_key.data_ptr(), of_value.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return grads


def _takes(dtype: torch.dtype, dim: int) -> bool:
    return dtype is torch.bfloat16 and dim % 16 == 0 and 0 < dim <= _WIDEST


def _served(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> bool:
    of_one_width = query.shape[-1] == key.shape[-1] == value.shape[-1]
    return scaling > 0 and of_one_width and all(_takes(x.dtype, x.shape[-1]) for x in (query, key, value))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _heads(x: Tensor) -> _Heads:
    return x.data_ptr(), x.stride(0), x.stride(1)
