"""Rotary position embeddings: all heads of a position by one program, which reads its angles once."""

import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.operations import rotation
from veneer.kernels.triton.launch import EXACT, check_like, kernels_take, power_of_two

_TILE = 2048  # pairs of a program


@triton.jit
def rotated(a, b, cos, sin, SIGN: tl.constexpr, TYPE: tl.constexpr):
    """a cos ± b sin, each product and the sum rounded to the type as the models' own is."""
    return (a * cos).to(TYPE).to(tl.float32) + SIGN * (b * sin).to(TYPE).to(tl.float32)


@triton.jit
def rotate_heads(
    x, cosines, sines, out, batch_stride, head_stride, token_stride, table_stride, tokens, heads, half,
    TRANSPOSED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = (tl.program_id(2) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, HALF)[None, :]
    keep = (head < heads) & (pair < half)
    table = batch * table_stride + token * 2 * half + pair
    c0 = tl.load(cosines + table, mask=pair < half, other=0.0).to(tl.float32)
    c1 = tl.load(cosines + table + half, mask=pair < half, other=0.0).to(tl.float32)
    s0 = tl.load(sines + table, mask=pair < half, other=0.0).to(tl.float32)
    s1 = tl.load(sines + table + half, mask=pair < half, other=0.0).to(tl.float32)
    source = x + batch * batch_stride + head.to(tl.int64) * head_stride + token * token_stride + pair
    a = tl.load(source, mask=keep, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=keep, other=0.0).to(tl.float32)
    if TRANSPOSED:
        first = rotated(a, b, c0, s1, 1.0, out.dtype.element_ty)
        second = rotated(b, a, c1, s0, -1.0, out.dtype.element_ty)
    else:
        first = rotated(a, b, c0, s0, -1.0, out.dtype.element_ty)
        second = rotated(b, a, c1, s1, 1.0, out.dtype.element_ty)
    into = out + ((batch * tokens + token) * heads + head) * 2 * half + pair
    tl.store(into, first.to(out.dtype.element_ty), mask=keep)
    tl.store(into + half, second.to(out.dtype.element_ty), mask=keep)


def triton_rotate(x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool) -> Tensor:
    if not kernels_take(x, cosines, sines):
        return rotation.rotate.definition(x, cosines, sines, transposed)
    batch, heads, tokens, dim = x.shape
    if dim % 2:
        raise ValueError(f"Halves are rotated, and {dim} has none.")
    check_like("cosines", cosines, x, (batch if len(cosines) != 1 else 1, tokens, dim))
    check_like("sines", sines, x, tuple(cosines.shape))
    x = x if x.stride(3) == 1 else x.contiguous()
    cosines, sines = cosines.contiguous(), sines.contiguous()
    out = x.new_empty(batch, tokens, heads, dim)
    half = power_of_two(dim // 2)
    tile = max(1, min(power_of_two(heads), _TILE // half))
    rotate_heads[(tokens, batch, triton.cdiv(heads, tile))](
        x, cosines, sines, out, x.stride(0), x.stride(1), x.stride(2), 0 if len(cosines) == 1 else tokens * dim,
        tokens, heads, dim // 2, TRANSPOSED=transposed, HEADS=tile, HALF=half, **EXACT,
    )  # fmt: skip
    return out.transpose(1, 2)
