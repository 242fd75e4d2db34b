"""Attention of training over rows back to back, its gradients and its autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.operation import operation

_ROWS = "int[] lengths, float scaling, bool causal, int window"


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=_sums(query))


@operation(f"(Tensor query, Tensor key, Tensor value, {_ROWS}) -> (Tensor, Tensor)", fake=_fake_attention)
def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """softmax(scaling · query keyᵀ) value within each row: query (tokens, heads, dim), key and value (tokens, key
    heads, dim), of which heads are a multiple, as many query heads in turn sharing one; rows of ``lengths`` tokens
    back to back. ``causal``: a query attends to itself and those before it, with a ``window`` other than 0 to so many.

    Returns the output as query, and the logarithm of each query's sum of exponentials (heads, tokens), fp32 at least,
    from which `attention_backward` has the softmax again (Dao, 2023, arXiv:2307.08691, algorithm 1).
    """
    check_rows(query, key, value, lengths, causal, window)
    outputs, sums = [torch.empty_like(query[:0])], [query.new_empty((query.shape[1], 0), dtype=_sums(query))]
    for q, k, v in _rows(lengths, query, key, value):
        scores = _scores(q, k, scaling, causal, window)
        sums.append(scores.logsumexp(-1).flatten(0, 1))
        y = torch.einsum("hgqk,khd->qhgd", scores.softmax(-1), v.to(scores.dtype))
        outputs.append(y.flatten(1, 2).to(query.dtype))
    return torch.cat(outputs), torch.cat(sums, 1)


def _fake_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, lengths: list[int],
    scaling: float, causal: bool, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@operation(
    f"(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_ROWS})"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_attention_backward,
)
def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, lengths: list[int],
    scaling: float, causal: bool, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value from that of the output, ``grad``, and from what `attention` gave (Dao,
    2023, algorithm 2)."""
    check_rows(query, key, value, lengths, causal, window)
    check_outcome(grad, out, lse, query)
    grads: tuple[list[Tensor], ...] = tuple([torch.empty_like(x[:0])] for x in (query, key, value))
    of_rows = _rows(lengths, query, key, value, grad, out, lse.t())
    for q, k, v, g, o, sums in of_rows:
        scores = _scores(q, k, scaling, causal, window)
        q, k, v, g, o = (x.to(scores.dtype) for x in (q, k, v, g, o))
        g, o, q = (x.unflatten(1, scores.shape[:2]) for x in (g, o, q))
        shares = (scores - sums.t().reshape(*scores.shape[:3], 1)).exp()
        dots = (g * o).sum(-1).permute(1, 2, 0)
        slopes = shares * (torch.einsum("qhgd,khd->hgqk", g, v) - dots[..., None]) * scaling
        grads[0].append(torch.einsum("hgqk,khd->qhgd", slopes, k).flatten(1, 2).to(query.dtype))
        grads[1].append(torch.einsum("hgqk,qhgd->khd", slopes, q).to(key.dtype))
        grads[2].append(torch.einsum("hgqk,qhgd->khd", shares, g).to(value.dtype))
    return torch.cat(grads[0]), torch.cat(grads[1]), torch.cat(grads[2])


def check_rows(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool, window: int) -> None:
    """Raises ValueError where these do not fit each other."""
    tokens, heads, dim = query.shape
    if sum(lengths) != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"The lengths of rows, none below 0, add up to the {tokens} tokens, not to {sum(lengths)}.")
    if window < 0 or (window and not causal):
        raise ValueError(f"A window is of causal attention and 0 or more tokens wide, not {window}.")
    key_heads = key.shape[1]
    if not key_heads or heads % key_heads:
        raise ValueError(f"{heads} heads do not share {key_heads} key heads.")
    for name, tensor in (("key", key), ("value", value)):
        _check_like(name, tensor, (tokens, key_heads, dim), query)


def check_outcome(grad: Tensor, out: Tensor, lse: Tensor, query: Tensor) -> None:
    """Raises ValueError where these are not of the attention of ``query``."""
    _check_like("grad", grad, query.shape, query)
    _check_like("out", out, query.shape, query)
    if lse.shape != query.shape[1::-1] or lse.dtype != _sums(query):
        raise ValueError(f"lse is {_sums(query)} {tuple(query.shape[1::-1])}, not {lse.dtype} {tuple(lse.shape)}.")


def _check_like(name: str, tensor: Tensor, shape: Sequence[int], query: Tensor) -> None:
    if tensor.shape != shape or tensor.dtype != query.dtype or tensor.device != query.device:
        raise ValueError(
            f"{name} must be {query.dtype} {tuple(shape)} on {query.device}, not {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}."
        )


def _sums(query: Tensor) -> torch.dtype:
    """What is summed up in."""
    return torch.promote_types(query.dtype, torch.float32)


def _rows(lengths: list[int], *tensors: Tensor) -> Any:
    return zip(*(torch.split(x, lengths) for x in tensors), strict=True)


def _scores(q: Tensor, k: Tensor, scaling: float, causal: bool, window: int) -> Tensor:
    """(key heads, query heads of each, queries, keys) of one row, −∞ where a query does not attend."""
    of_each = q.reshape(len(q), k.shape[1], q.shape[1] // k.shape[1], q.shape[2]).to(_sums(q))
    scores = torch.einsum("qhgd,khd->hgqk", of_each, k.to(_sums(q))) * scaling
    if not causal:
        return scores
    place = torch.arange(len(q), device=q.device)
    distance = place[:, None] - place
    return scores.masked_fill((distance < 0) | (distance >= (window or len(q))), float("-inf"))


def differentiable_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, causal: bool, window: int
) -> Tensor:
    """The output of `attention`, differentiable in query, key and value; saves these, the output and a number a query
    and head."""
    y: Tensor = _Attention.apply(query, key, value, lengths, scaling, causal, window)  # type: ignore[no-untyped-call]
    return y


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *how: Any) -> Tensor:
        y, lse = attention(query, key, value, *how)
        ctx.save_for_backward(query, key, value, y, lse)
        ctx.how = how
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *attention_backward(grad, *ctx.saved_tensors, *ctx.how), *[None] * len(ctx.how)
