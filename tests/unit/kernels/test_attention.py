"""Attention over rows back to back: its definition against torch's in fp64, the kernels against torch's in bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guarded import guarded
from veneer.kernels import extension
from veneer.kernels.backends.flash import FlashAttention
from veneer.kernels.backends.tiled_attention import TiledAttention
from veneer.kernels.operations.attention import attention, attention_backward, differentiable_attention
from veneer.kernels.serving import on_cpu

if extension.VARIANTS:
    from veneer.kernels import _cpu

pytestmark = pytest.mark.unit

TILES = any(map(extension.has_tiles, extension.VARIANTS))
tiled, flash = TiledAttention(), FlashAttention()
with_tiles = pytest.mark.skipif(not TILES, reason="this processor has no AMX")
# Those without tiles compute everywhere, if not everywhere faster.
every_kernel = pytest.mark.parametrize(
    "kernels", [pytest.param(tiled, marks=with_tiles, id="tiled"), pytest.param(flash, id="flash")]
)


def _drawn(tokens, heads, key_heads, dim, seed=0, dtype=torch.bfloat16):
    """Query, key, value and the output's gradient."""
    drawn = torch.Generator().manual_seed(seed)
    shapes = [(tokens, n, dim) for n in (heads, key_heads, key_heads, heads)]
    return [torch.randn(shape, generator=drawn).to(dtype) for shape in shapes]


def _of_torch(query, key, value, lengths, scaling, causal, window):
    """By torch's attention, row by row."""
    outputs = []
    for q, k, v in zip(*(torch.split(x, lengths) for x in (query, key, value)), strict=True):
        place = torch.arange(len(q))
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance < (window or len(q))) if window else None
        y = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=seen, is_causal=causal and seen is None,
            scale=scaling, enable_gqa=True,
        )  # fmt: skip
        outputs.append(y[0].transpose(0, 1))
    return torch.cat(outputs)


def _with_gradients(run, query, key, value, grad):
    parts = [x.detach().requires_grad_() for x in (query, key, value)]
    y = run(*parts)
    return [y.detach(), *torch.autograd.grad(y, parts, grad)]


def _by(kernels, query, key, value, grad, *how):
    y, lse = kernels.attend(query, key, value, *how)
    return [y, *kernels.attend_backward(grad, query, key, value, y, lse, *how)]


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5)
HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])
HOW = st.sampled_from([(True, 0), (True, 1), (True, 7), (True, 40), (False, 0)])  # causal, window


@given(LENGTHS.filter(any), HEADS, st.integers(1, 9), HOW)
def test_the_definition_is_torchs_attention_of_each_row(lengths, heads, dim, how):
    *parts, grad = _drawn(sum(lengths), *heads, dim, dtype=torch.float64)
    rows = [length for length in lengths if length]
    found = _with_gradients(lambda *x: differentiable_attention(*x, lengths, 0.3, *how), *parts, grad)
    wanted = _with_gradients(lambda *x: _of_torch(*x, rows, 0.3, *how), *parts, grad)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_definitions_gradients_are_those_of_its_output():
    parts = [x.requires_grad_() for x in _drawn(9, 4, 2, 3, dtype=torch.float64)[:3]]
    for causal, window in ((True, 0), (True, 2), (False, 0)):
        assert torch.autograd.gradcheck(lambda *x: differentiable_attention(*x, [5, 4], 0.7, causal, window), parts)  # noqa: B023


def test_the_operators_keep_torchs_contracts():
    for dtype, dim in ((torch.float32, 8), (torch.bfloat16, 32)):
        query, key, value, grad = _drawn(7, 4, 2, dim, dtype=dtype)
        how = [3, 4], 0.3, True, 0
        torch.library.opcheck(attention.operator, (query, key, value, *how))
        y, lse = attention(query, key, value, *how)
        torch.library.opcheck(attention_backward.operator, (grad, query, key, value, y, lse, *how))


def _off(found, wanted):
    return [float((one.double() - other).norm()) for one, other in zip(found, wanted, strict=True)]


@every_kernel
@settings(max_examples=60)
@example([300], (3, 1), 64, (True, 0), 0)
@example([129, 128, 33, 32, 31], (2, 1), 128, (True, 0), 0)
@example([290, 7], (2, 2), 80, (True, 100), 0)
@example([270], (1, 1), 256, (False, 0), 0)
@example([300], (2, 1), 32, (True, 33), 0)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=4), HEADS, st.sampled_from([16, 32, 48, 64, 80, 128]), HOW,
    st.integers(0, 9),
)  # fmt: skip
def test_the_error_is_no_larger_than_torchs_in_bf16(kernels, lengths, heads, dim, how, seed):
    *parts, grad = _drawn(sum(lengths), *heads, dim, seed)
    exact = [x.double() for x in parts]
    scaling = dim**-0.5
    wanted = _with_gradients(lambda *x: _of_torch(*x, lengths, scaling, *how), *exact, grad.double())
    peer = _with_gradients(lambda *x: _of_torch(*x, lengths, scaling, *how), *parts, grad)
    found = _by(kernels, *parts, grad, lengths, scaling, *how)
    assert [x.shape for x in found] == [x.shape for x in wanted]
    for off, peers, size in zip(_off(found, wanted), _off(peer, wanted), wanted, strict=True):
        # Of one key nothing is learned by queries and keys: what is left there is the rounding of two equal numbers.
        assert off <= 1.5 * peers + 1e-5 * size.numel() ** 0.5
    lse = kernels.attend(*parts, lengths, scaling, *how)[1]
    torch.testing.assert_close(lse.double(), attention(*exact, lengths, scaling, *how)[1], rtol=1e-5, atol=1e-5)


@every_kernel
def test_large_scores_neither_overflow_nor_vanish(kernels):
    query, key, value, grad = _drawn(90, 2, 1, 32)
    found = _by(kernels, 40 * query, 40 * key, value, grad, [50, 40], 1.0, True, 0)
    exact = [x.double() for x in (40 * query, 40 * key, value)]
    wanted = _with_gradients(lambda *x: _of_torch(*x, [50, 40], 1.0, True, 0), *exact, grad.double())
    assert all(x.isfinite().all() for x in found)
    assert _off(found[:1], wanted[:1])[0] <= 4e-3 * wanted[0].norm()


@every_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_number_that_is_not_finite_shows(kernels, value, place):
    parts = _drawn(70, 1, 1, 32)[:3]
    parts[0][..., 3] = parts[0][..., 3].abs() + 1  # infinite scores are +∞
    parts[place][5, 0, 3] = value
    y, _ = kernels.attend(*parts, [40, 30], 0.2, True, 0)
    assert not y[5].isfinite().all()
    assert y[40:].isfinite().all()


@every_kernel
def test_any_strides_give_the_same_numbers(kernels):
    """From tiles the same bits; torch multiplies by strides in other ways."""
    close = {} if kernels is flash else {"rtol": 0, "atol": 0}
    how = [33, 5, 64], 0.2, True, 0
    query, key, value, grad = _drawn(102, 4, 2, 48)
    wanted = _by(kernels, query, key, value, grad, *how)
    together = torch.cat([query, key, value], 1)
    by_head = grad.transpose(0, 1).contiguous().transpose(0, 1)
    views = together[:, :4], together[:, 4:6], together[:, 6:]
    scattered = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    for parts in (views, scattered):
        torch.testing.assert_close(_by(kernels, *parts, by_head, *how), wanted, **close)
    y, lse = kernels.attend(*views, *how)
    even = torch.ones((), dtype=torch.bfloat16).expand(102, 4, 48)
    found = kernels.attend_backward(even, *views, y, lse, *how)
    wanted = kernels.attend_backward(even.contiguous(), query, key, value, y, lse, *how)
    torch.testing.assert_close(found, wanted, **close)


@every_kernel
def test_a_rows_numbers_are_its_own_and_the_same_in_every_call(kernels):
    """Beside other rows, alone, and with any number of threads."""
    lengths = [70, 3, 200, 41, 200]
    parts = _drawn(sum(lengths), 4, 2, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            found.append(_by(kernels, *parts, lengths, 0.125, True, 0))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    if kernels is tiled:
        alone = _by(kernels, *(x[73:273] for x in parts), [200], 0.125, True, 0)
        assert all(torch.equal(a[73:273], b) for a, b in zip(found[0], alone, strict=True))


@with_tiles
@pytest.mark.parametrize("length", [1, 16, 31, 33, 130])
@pytest.mark.parametrize("dim", [16, 48, 64])
def test_nothing_beyond_the_tensors_is_read_or_written(length, dim):
    heads, key_heads = 2, 1
    parts = _drawn(length, heads, key_heads, dim)
    query, key, value, grad = map(guarded, parts)
    how = [length], heads, key_heads, dim, 0.25, True, 0
    lse = guarded(torch.zeros(heads, length))
    made = [guarded(torch.zeros_like(x)) for x in (query, query, key, value)]
    q, k, v, g, y = ((x.data_ptr(), x.stride(0), x.stride(1)) for x in (query, key, value, grad, made[0]))
    out, *grads = (x.data_ptr() for x in made)
    _cpu.attention(q, k, v, *how, out, lse.data_ptr(), 1)
    _cpu.attention_backward(g, q, k, v, y, lse.data_ptr(), *how, *grads, 1)
    for found, wanted in zip(made, _by(tiled, *parts, [length], 0.25, True, 0), strict=True):
        assert torch.equal(found, wanted)


@every_kernel
def test_what_does_not_fit_is_refused_before_an_address_is_passed_on(kernels):
    query, key, value, grad = _drawn(8, 4, 2, 32)
    how = [5, 3], 0.2, True, 0
    y, lse = kernels.attend(query, key, value, *how)
    for run in (kernels.attend, attention):
        with pytest.raises(ValueError, match="add up to the 8 tokens, not to 7"):
            run(query, key, value, [5, 2], 0.2, True, 0)
        with pytest.raises(ValueError, match="none below 0"):
            run(query, key, value, [9, -1], 0.2, True, 0)
        with pytest.raises(ValueError, match="A window is of causal attention"):
            run(query, key, value, [5, 3], 0.2, False, 4)
        with pytest.raises(ValueError, match="4 heads do not share 3 key heads"):
            run(query, key.repeat(1, 2, 1)[:, :3], value, *how)
        with pytest.raises(ValueError, match=r"value must be torch\.bfloat16 \(8, 2, 32\)"):
            run(query, key, value[:7], *how)
    for run in (kernels.attend_backward, attention_backward):
        with pytest.raises(ValueError, match=r"grad must be torch\.bfloat16 \(8, 4, 32\)"):
            run(grad[:, :3], query, key, value, y, lse, *how)
        with pytest.raises(ValueError, match=r"lse is torch\.float32 \(4, 8\)"):
            run(grad, query, key, value, y, lse.t(), *how)


@every_kernel
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 32), (torch.float64, 32), (torch.float16, 8)])
def test_other_types_are_computed_by_the_definition(kernels, dtype, dim):
    *parts, grad = _drawn(11, 4, 2, dim, dtype=dtype)
    how = [5, 6], 0.2, True, 3
    y, lse = attention.definition(*parts, *how)
    wanted = [y, *attention_backward.definition(grad, *parts, y, lse, *how)]
    assert all(torch.equal(a, b) for a, b in zip(_by(kernels, *parts, grad, *how), wanted, strict=True))


def test_which_kernels_attend():
    for name in extension.VARIANTS:
        kernels = on_cpu(name)
        served = {kernel.name for kernel in kernels.kernels()} & {attention.name, attention_backward.name}
        wanted = extension.has_tiles(name) or (name == "avx512" and torch.cpu._is_avx512_bf16_supported())
        assert kernels.attends(torch.bfloat16, 64) == wanted == bool(served)
        assert not kernels.attends(torch.float32, 64)
    assert not tiled.attends(torch.bfloat16, 24)
    assert not tiled.attends(torch.bfloat16, 512)
