"""The operations that the C++ computes by AMX tiles, in bf16: checks tensors, and passes their addresses on."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.extension import VARIANTS
from veneer.kernels.operation import Kernel
from veneer.kernels.operations import attention

if VARIANTS:
    from veneer.kernels import _cpu

_Place = tuple[int, int, int]
_WIDEST = 256  # dimensions of a head


def kernels() -> tuple[Kernel, ...]:
    return attention.attention.by(attend), attention.attention_backward.by(attend_backward)


def attends(dtype: torch.dtype, dim: int) -> bool:
    """Whether `attend` computes attention of this type by heads of so many dimensions, and not the definition."""
    return dtype is torch.bfloat16 and dim % 16 == 0 and 0 < dim <= _WIDEST


def attend(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    if not _served(query, key, value, scaling):
        return attention.attention.definition(query, key, value, lengths, scaling, causal, window)
    _check_rows(query, key, value, lengths, causal, window)
    tokens, heads, dim = query.shape
    out, lse = query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=torch.float32)
    placed, _alive = _places(query, key, value)
    _cpu.attention(
        *placed, lengths, heads, key.shape[1], dim, scaling, causal, window, out.data_ptr(), lse.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, lengths: list[int],
    scaling: float, causal: bool, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not _served(query, key, value, scaling) or not attends(grad.dtype, grad.shape[-1]):
        return attention.attention_backward.definition(
            grad, query, key, value, out, lse, lengths, scaling, causal, window
        )
    _check_rows(query, key, value, lengths, causal, window)
    for name, tensor in (("grad", grad), ("out", out)):
        _check(name, tensor, query.shape, torch.bfloat16)
    _check("lse", lse, query.shape[1::-1], torch.float32)
    lse = lse.contiguous()
    grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    placed, _alive = _places(grad, query, key, value, out)
    _cpu.attention_backward(
        *placed, lse.data_ptr(), lengths, query.shape[1], key.shape[1], query.shape[2], scaling, causal, window,
        *(x.data_ptr() for x in grads), torch.get_num_threads(),
    )  # fmt: skip
    return grads


def _served(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> bool:
    of_one_width = query.shape[-1] == key.shape[-1] == value.shape[-1]
    return scaling > 0 and of_one_width and all(attends(x.dtype, x.shape[-1]) for x in (query, key, value))


def _places(*tensors: Tensor) -> tuple[list[_Place], list[Tensor]]:
    """Address and distances of tokens and heads, of each; and the tensors that are at them."""
    dense = [x if x.stride(2) == 1 else x.contiguous() for x in tensors]
    return [(x.data_ptr(), x.stride(0), x.stride(1)) for x in dense], dense


def _check_rows(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool, window: int) -> None:
    tokens, heads, dim = query.shape
    if sum(lengths) != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"The lengths of rows add up to the {tokens} tokens, not to {sum(lengths)}.")
    if window < 0 or (window and not causal):
        raise ValueError(f"A window is of causal attention and 0 or more, not {window}.")
    key_heads = key.shape[1]
    if not key_heads or heads % key_heads:
        raise ValueError(f"{heads} heads do not share {key_heads} key heads.")
    for name, tensor in (("key", key), ("value", value)):
        _check(name, tensor, (tokens, key_heads, dim), torch.bfloat16)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be {dtype} {tuple(shape)} on the CPU, not {tensor.dtype} {tuple(tensor.shape)} on "
            f"{tensor.device}."
        )
