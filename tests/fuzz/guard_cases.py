"""Random arguments of every kernel, and what it must give: its definition's numbers, as near as its own tests ask."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.frozen.codebook import codebook, dynamic8, levels8, search
from veneer.kernels.coded import CodedWeight
from veneer.kernels.operations import (
    adapted,
    attention,
    cross_entropy,
    gates,
    gguf_blocks,
    norm,
    products,
    products_int8,
    quantise,
    rotation,
    update,
)
from veneer.kernels.operations.products_int8 import in_8_bits, rows_in_8_bits, unpacked8

STEP = 2.0**-7  # between neighbours of bf16
SINGLE = 1e-6  # what fp32 loses of what was summed or multiplied


class Case(NamedTuple):
    """``arguments`` draws them, a `CodedWeight` as one; ``check`` raises AssertionError at other results than the
    definition has, given the results, the arguments as they were, and as they are; ``written`` are the places of those
    that the kernel may change."""

    arguments: Callable[[Draw], tuple[Any, ...]]
    check: Callable[[Any, tuple[Any, ...], tuple[Any, ...]], None]
    written: tuple[int, ...] = ()


class Draw:
    """Sizes, numbers and layouts of one case."""

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)
        self._numbers = torch.Generator().manual_seed(self.rng.getrandbits(40))

    def one_of(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def yes(self, chance: float = 0.5) -> bool:
        return self.rng.random() < chance

    def size(self, most: int = 300, least: int = 1) -> int:
        """Often small, often beside a multiple of what vectors and tiles take."""
        near = self.rng.choice((8, 16, 32, 64)) * self.rng.randint(1, 5) + self.rng.randint(-1, 1)
        drawn = self.rng.choice((self.rng.randint(least, 20), self.rng.randint(least, most), near))
        return max(least, min(most, drawn))

    def rows(self, most: int = 9) -> int:
        return 0 if self.yes(0.05) else self.rng.randint(1, most)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._numbers) * scale).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, shape, generator=self._numbers, dtype=dtype)

    def anyhow(self, tensor: Tensor) -> Tensor:
        """The same numbers, often with the dimensions in another order or with gaps."""
        if self.yes(0.4):
            return tensor
        order = self.rng.sample(range(tensor.dim()), tensor.dim())
        strides, next_one = [0] * tensor.dim(), 1
        for place in order:
            next_one += self.rng.choice((0, 0, 1, 3))
            strides[place] = next_one
            next_one *= max(1, tensor.shape[place])
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True) if n)
        return torch.zeros(extent, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)

    def weight(self, rows: int, columns: int, *, bits: int) -> CodedWeight:
        """Any codes with any scales."""
        elements, block = rows * columns, self.one_of(32, 64, 96, 128, 1024)
        blocks, nested_block = -(-elements // block), self.one_of(1, 16, 256)
        codes = self.integers(0, 256, (elements + 1) // 2) if bits == 4 else self.integers(0, 255, elements)
        table = codebook(self.one_of("nf4", "fp4")) if bits == 4 else None
        nested = self.yes()
        scales = self.integers(0, 256, blocks) if nested else self.normal(blocks).abs()
        rest: tuple[Any, ...] = (None, None, None)
        if nested:
            rest = dynamic8(), self.normal(-(-blocks // nested_block)).abs(), self.normal().abs()
        return CodedWeight(codes, table, scales, *rest, block, nested_block, rows, columns)


def double(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def near(found: Tensor, wanted: Tensor, size: Tensor, steps: float = 0.0) -> None:
    """To fp32's rounding of ``size``, what was summed or multiplied, and to so many steps of bf16 of the result."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    off = (found.double() - wanted.double()).abs()
    assert (off <= SINGLE * size.double() + steps * STEP * wanted.double().abs() + 1e-36).all(), float(off.max())


def same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def _all_the_same(definition: Callable[..., Any]) -> Callable[..., None]:
    """The check of a kernel that gives its definition's very bits."""

    def check(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
        wanted = definition(*given)
        pairs = ((found, wanted),) if isinstance(found, Tensor) else zip(found, wanted, strict=True)
        for one, other in pairs:
            same(one, other)

    return check


def _values(draw: Draw) -> Tensor:
    size = draw.one_of(0, draw.size(), draw.size(), draw.size(), draw.rng.randint(1, 40000))
    values = draw.normal(size, scale=draw.one_of(1e-30, 1.0, 1e30))
    return values * (draw.integers(0, 2, size) if draw.yes(0.2) else 1)


def _quantise4(draw: Draw) -> tuple[Any, ...]:
    values, order = codebook(draw.one_of("nf4", "fp4")).sort(stable=True)
    boundaries = (values[1:] + values[:-1]) / 2
    return _values(draw), boundaries, order.to(torch.uint8), draw.one_of(32, 64, 96, 1024)


def _quantise8(draw: Draw) -> tuple[Any, ...]:
    return _values(draw), search("int8").midpoints, draw.one_of(32, 64, 96, 1024)


def _gguf_blocks(draw: Draw) -> tuple[Any, ...]:
    return draw.normal(draw.rows(), 32 * draw.size(9)), draw.one_of(*gguf_blocks.KINDS)


def _nearest8(draw: Draw) -> tuple[Any, ...]:
    return _values(draw).clamp(-1, 1), search("dynamic8").midpoints


def _dequantise(draw: Draw) -> tuple[Any, ...]:
    rows, columns = draw.rows(), draw.size(draw.one_of(300, 4100))
    first = draw.rng.randint(0, rows)
    height = draw.rng.randint(0, rows - first)
    dtype = draw.one_of(torch.float32, torch.bfloat16, torch.float16, torch.float64)
    out = draw.anyhow(draw.normal(height, columns, dtype=dtype))
    return draw.weight(rows, columns, bits=draw.one_of(4, 8)), first, out


def _check_dequantise(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    products.dequantise.definition(*given)
    same(now[2], given[2])


def _coded_product(draw: Draw) -> tuple[Any, ...]:
    columns = draw.size(draw.one_of(300, 4100))
    x = draw.anyhow(draw.normal(draw.rng.randint(1, 8), columns))
    return x, draw.weight(draw.rows(), columns, bits=draw.one_of(4, 8))


def _dense(weight: CodedWeight) -> Tensor:
    out = torch.empty(weight.rows, weight.columns)
    products.dequantise.definition(weight, 0, out)
    return out.double()


def _check_coded_product(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    x, dense = given[0].double(), _dense(given[1])
    near(found, x @ dense.t(), x.abs() @ dense.abs().t())


def _product4_int8(draw: Draw) -> tuple[Any, ...]:
    columns = 32 * draw.rng.randint(1, draw.one_of(5, 131))
    levels, step = levels8(draw.one_of("nf4", "fp4", "int4"))
    x = draw.anyhow(draw.normal(draw.rng.randint(1, 8), columns))
    return x, draw.weight(draw.rows(), columns, bits=4), levels, step


def _check_product4_int8(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    x, weight, levels, step = given
    x, dense = in_8_bits(x).double(), _dense(weight._replace(table=levels.float())) * step
    near(found, x @ dense.t(), x.abs() @ dense.abs().t())


def _product8_int8(draw: Draw) -> tuple[Any, ...]:
    columns = 32 * draw.rng.randint(1, draw.one_of(5, 131))
    x = draw.anyhow(draw.normal(draw.rng.randint(1, 8), columns))
    codes, scales, _ = rows_in_8_bits(draw.normal(draw.rng.randint(1, 9), columns))
    return x, codes, scales


def _check_product8_int8(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    x, codes, scales = given
    dense = unpacked8(products_int8.EightBits(codes, scales, x.shape[1])).double()
    x = in_8_bits(x).double()
    near(found, x @ dense.t(), x.abs() @ dense.abs().t())


def _type(draw: Draw) -> torch.dtype:
    dtype: torch.dtype = draw.one_of(torch.float32, torch.bfloat16)
    return dtype


def _rms_norm(draw: Draw) -> tuple[Any, ...]:
    shape, dtype = (draw.rows(), draw.size()), _type(draw)
    if draw.yes(0.3):
        shape = (draw.rows(3), *shape)
    weight = draw.normal(shape[-1], dtype=draw.one_of(torch.float32, dtype))
    x = draw.normal(*shape, dtype=dtype, scale=draw.one_of(1e-3, 1.0, 30.0))
    return draw.anyhow(x), draw.anyhow(weight), 1e-5, draw.yes()


def _check_rms_norm(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    steps = 0 if given[0].dtype == torch.float32 else 2
    y, inverse = norm.rms_norm.definition(*(given if steps else double(given)))
    near(found[0], y, y.abs(), steps)
    near(found[1], inverse, inverse)


def _rms_norm_backward(draw: Draw) -> tuple[Any, ...]:
    x, weight, eps, once = _rms_norm(draw)
    inverse = norm.rms_norm.definition(x, weight, eps, once)[1]
    return draw.anyhow(draw.normal(*x.shape, dtype=x.dtype)), x, draw.anyhow(inverse), weight, once


def _check_rms_norm_backward(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    exact = given[1].dtype == torch.float32
    wanted = norm.rms_norm_backward.definition(*(double(given) if exact else given))
    grad, x, inverse, weight, _ = double(given)
    product = (grad * weight).abs()
    along = (product * x.abs()).mean(-1, keepdim=True) * inverse**2
    near(found, wanted, 2 * (product + x.abs() * along) * inverse, 0 if exact else 1)


def _gated(count: int) -> Callable[[Draw], tuple[Any, ...]]:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        shape, dtype = (draw.rows(), draw.size()), _type(draw)
        scale = draw.one_of(1e-3, 1.0, 5.0)
        return tuple(draw.anyhow(draw.normal(*shape, dtype=dtype, scale=scale)) for _ in range(count))

    return arguments


def _check_gated(definition: Callable[..., Any], slope: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """``slope`` is the size of what its gate's slope is summed of."""

    def check(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
        exact = given[0].dtype == torch.float32
        wanted = definition(*(double(given) if exact else given))
        *grad, gate, up = (tensor.abs() for tensor in double(given))
        if not grad:
            near(found, wanted, gate * up, 0 if exact else 2)
            return
        near(found[0], wanted[0], grad[0] * up * slope(gate), 0 if exact else 1)
        near(found[1], wanted[1], grad[0] * gate, 0 if exact else 2)

    return check


def _of_silu(gate: Tensor) -> Tensor:
    return 1 + gate


def _of_gelu(gate: Tensor) -> Tensor:
    return 1 + 2 * gate * (1 + 0.134 * gate**2)


def _rotate(draw: Draw) -> tuple[Any, ...]:
    batch, heads, tokens = draw.rows(3), draw.rows(4), draw.rows()
    dim, dtype = draw.one_of(2, 6, 16, 64, 80, 2 * draw.rng.randint(1, 70)), _type(draw)
    tables = [draw.normal(batch if draw.yes() else 1, tokens, dim, dtype=dtype)]
    tables.append(draw.normal(*tables[0].shape, dtype=dtype))
    x = draw.anyhow(draw.normal(batch, heads, tokens, dim, dtype=dtype))
    return x, *map(draw.anyhow, tables), draw.yes()


def _check_rotate(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    wanted = rotation.rotate.definition(*given)
    if given[0].dtype == torch.bfloat16:
        same(found, wanted)
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def _cross_entropy(draw: Draw) -> tuple[Any, ...]:
    rows, width = draw.rows(), draw.one_of(draw.size(), 4095, 4097)
    logits = draw.normal(rows, width, dtype=_type(draw), scale=draw.one_of(0.01, 1.0, 8.0))
    labels = draw.integers(0, width, rows, dtype=torch.int64)
    return draw.anyhow(logits), draw.anyhow(labels), draw.one_of(0.0, 0.1, 1.0)


def _check_cross_entropy(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    wanted = cross_entropy.cross_entropy.definition(*double(given))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)


def _check_cross_entropy_gradient(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    exact, labels, smoothing = double(given)
    below = (exact.amax(1, keepdim=True) - exact).clamp(max=100) if len(exact) else exact.clone()
    shares = torch.softmax(exact, -1)
    _check_cross_entropy(found, given, now)
    cross_entropy.cross_entropy_gradient.definition(exact, labels, smoothing)
    allowed = 1e-6 * shares * (1 + below) + 2e-7 * exact.abs() + 1e-7 * smoothing + 1e-36
    if now[0].dtype == torch.bfloat16:
        allowed += STEP * exact.abs()
    assert ((now[0].double() - exact).abs() <= allowed).all()


def _update_product(draw: Draw) -> tuple[Any, ...]:
    tokens, into, out, rank = draw.rows(40), draw.size(90), draw.size(90), draw.rng.randint(1, 24)
    x, A, B = (draw.anyhow(draw.normal(*shape)) for shape in ((tokens, into), (rank, into), (out, rank)))
    y = draw.normal(tokens, out)
    return x, A, B, draw.one_of(0.5, 2.0), draw.anyhow(y) if draw.yes(0.3) else y


def _check_update_product(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    x, A, B, scale, y = double(given)
    low_size = x.abs() @ A.abs().T
    near(found, x @ A.T, low_size)
    near(now[4], y + scale * (x @ A.T) @ B.T, y.abs() + scale * low_size @ B.abs().T)


def _update_product_backward(draw: Draw) -> tuple[Any, ...]:
    x, A, B, scale, _ = _update_product(draw)
    grad = draw.anyhow(draw.normal(len(x), len(B)))
    grad_x = draw.normal(*x.shape) if draw.yes(0.7) else None
    return grad, x, draw.anyhow(x @ A.T), A, B, scale, grad_x


def _check_update_product_backward(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    grad, x, low, A, B, scale, grad_x = double(given)
    grad_low, size = scale * grad @ B, scale * grad.abs() @ B.abs()
    near(found[0], grad_low.T @ x, size.T @ x.abs())
    near(found[1], scale * grad.T @ low, scale * grad.abs().T @ low.abs())
    if grad_x is not None:
        near(now[6], grad_x + grad_low @ A, grad_x.abs() + size @ A.abs())


def _attention(draw: Draw) -> tuple[Any, ...]:
    lengths = [draw.rng.randint(0, draw.one_of(5, 40, 140)) for _ in range(draw.rng.randint(1, 4))]
    heads, shared = draw.one_of((1, 1), (2, 2), (4, 2), (3, 1))
    dim, dtype = draw.one_of(8, 16, 32, 48, 64, 80), draw.one_of(torch.bfloat16, torch.bfloat16, torch.float32)
    parts = (draw.anyhow(draw.normal(sum(lengths), n, dim, dtype=dtype)) for n in (heads, shared, shared))
    causal = draw.yes(0.8)
    return *parts, lengths, dim**-0.5, causal, draw.one_of(0, 1, 7, 40) if causal else 0


def _attention_backward(draw: Draw) -> tuple[Any, ...]:
    *parts, lengths, scaling, causal, window = _attention(draw)
    how = lengths, scaling, causal, window
    out, lse = attention.attention.definition(*parts, *how)
    grad = draw.anyhow(draw.normal(*out.shape, dtype=out.dtype))
    return grad, *parts, draw.anyhow(out), draw.anyhow(lse), *how


def _off(found: Tensor, wanted: Tensor, bf16: bool) -> None:
    """As a whole: a sum of bf16 numbers, some of which are sums themselves."""
    assert found.shape == wanted.shape
    share, each = (2e-2, 2e-2) if bf16 else (1e-5, 1e-5)
    assert (found.double() - wanted).norm() <= share * wanted.norm() + each * wanted.numel() ** 0.5


def _check_attention(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    y, lse = attention.attention.definition(*double(given))
    _off(found[0], y, given[0].dtype == torch.bfloat16)
    torch.testing.assert_close(found[1].double(), lse, rtol=1e-5, atol=1e-5)


def _check_attention_backward(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    for one, other in zip(found, attention.attention_backward.definition(*double(given)), strict=True):
        _off(one, other, given[0].dtype == torch.bfloat16)


def _adapted(coded: bool) -> Callable[[Draw], tuple[Any, ...]]:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        tokens, into, out, rank = draw.rows(70), draw.size(140), draw.size(140), draw.one_of(0, 1, 3, 8, 16, 17, 33)
        weight: Any = draw.weight(out, into, bits=draw.one_of(4, 8))
        if not coded:
            dense = draw.normal(out, into, dtype=draw.one_of(torch.bfloat16, torch.float32, torch.float16))
            weight = draw.anyhow(dense)
        A, B = (draw.anyhow(draw.normal(*shape)) if rank else None for shape in ((rank, into), (out, rank)))
        bias = draw.normal(out) if draw.yes() else None
        return draw.anyhow(draw.normal(tokens, into, dtype=torch.bfloat16)), weight, bias, A, B, draw.one_of(0.5, 2.0)

    return arguments


def _adapted_backward(coded: bool) -> Callable[[Draw], tuple[Any, ...]]:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        x, weight, _, A, B, scale = _adapted(coded)(draw)
        out = weight.rows if coded else len(weight)
        low = x.new_empty(len(x), 0) if A is None else x @ A.to(x.dtype).t()
        grad = draw.anyhow(draw.normal(len(x), out, dtype=torch.bfloat16))
        return grad, weight, x, low, A, B, scale, draw.yes(0.8), draw.yes(0.8)

    return arguments


def _expanded(weight: Any) -> Tensor:
    dense = _dense(weight) if isinstance(weight, CodedWeight) else weight
    return dense.bfloat16().double()


def _factors(A: Tensor | None, B: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    out, into = weight.shape
    return (A, B) if A is not None and B is not None else (weight.new_zeros(0, into), weight.new_zeros(out, 0))


def _check_adapted(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    weight = _expanded(given[1])
    x, _, bias, A, B, scale = double(given)
    A, B = _factors(A, B, weight)
    low_size = x.abs() @ A.abs().T
    _rounded(found[1], x @ A.T, low_size)
    bias = torch.zeros(len(weight)).double() if bias is None else bias
    _rounded(
        found[0], x @ weight.T + bias + scale * (x @ A.T) @ B.T,
        x.abs() @ weight.abs().T + bias.abs() + scale * low_size @ B.abs().T,
    )  # fmt: skip


def _check_adapted_backward(found: Any, given: tuple[Any, ...], now: tuple[Any, ...]) -> None:
    weight = _expanded(given[1])
    grad, _, x, low, A, B, scale, wants_x, wants_update = double(given)
    updated = wants_update and A is not None
    A, B = _factors(A, B, weight)
    grad_low, size = scale * grad @ B, scale * grad.abs() @ B.abs()
    wanted = (
        (wants_x, grad @ weight + grad_low @ A, grad.abs() @ weight.abs() + size @ A.abs()),
        (updated, grad_low.T @ x, size.T @ x.abs()),
        (updated, scale * grad.T @ low, scale * grad.abs().T @ low.abs()),
    )
    for one, (asked, other, sizes) in zip(found, wanted, strict=True):
        if asked:
            _rounded(one, other, sizes)
        else:
            assert not one.numel()


def _rounded(found: Tensor, wanted: Tensor, size: Tensor) -> None:
    """To four roundings to bf16 of what was added up."""
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= (2 * STEP + 1e-5) * size + 1e-30).all()


CASES = {
    quantise.quantise4.name: Case(_quantise4, _all_the_same(quantise.quantise4.definition)),
    quantise.quantise8.name: Case(_quantise8, _all_the_same(quantise.quantise8.definition)),
    gguf_blocks.gguf_blocks.name: Case(_gguf_blocks, _all_the_same(gguf_blocks.gguf_blocks.definition)),
    quantise.nearest8.name: Case(_nearest8, _all_the_same(quantise.nearest8.definition)),
    products.dequantise.name: Case(_dequantise, _check_dequantise, (2,)),
    products.coded_product.name: Case(_coded_product, _check_coded_product),
    products_int8.product4_int8.name: Case(_product4_int8, _check_product4_int8),
    products_int8.product8_int8.name: Case(_product8_int8, _check_product8_int8),
    norm.rms_norm.name: Case(_rms_norm, _check_rms_norm),
    norm.rms_norm_backward.name: Case(_rms_norm_backward, _check_rms_norm_backward),
    gates.swiglu.name: Case(_gated(2), _check_gated(gates.swiglu.definition, _of_silu)),
    gates.swiglu_backward.name: Case(_gated(3), _check_gated(gates.swiglu_backward.definition, _of_silu)),
    gates.geglu.name: Case(_gated(2), _check_gated(gates.geglu.definition, _of_gelu)),
    gates.geglu_backward.name: Case(_gated(3), _check_gated(gates.geglu_backward.definition, _of_gelu)),
    rotation.rotate.name: Case(_rotate, _check_rotate),
    cross_entropy.cross_entropy.name: Case(_cross_entropy, _check_cross_entropy),
    cross_entropy.cross_entropy_gradient.name: Case(_cross_entropy, _check_cross_entropy_gradient, (0,)),
    update.update_product.name: Case(_update_product, _check_update_product, (4,)),
    update.update_product_backward.name: Case(_update_product_backward, _check_update_product_backward, (6,)),
    attention.attention.name: Case(_attention, _check_attention),
    attention.attention_backward.name: Case(_attention_backward, _check_attention_backward),
    adapted.product_with_update.name: Case(_adapted(False), _check_adapted),
    adapted.product_with_update_coded.name: Case(_adapted(True), _check_adapted),
    adapted.product_with_update_backward.name: Case(_adapted_backward(False), _check_adapted_backward),
    adapted.product_with_update_coded_backward.name: Case(_adapted_backward(True), _check_adapted_backward),
}
