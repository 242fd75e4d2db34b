"""Every variant of the operations that this machine runs on weights in codes, against their definition in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from definitions import definitions
from veneer.errors import ConfigError
from veneer.frozen.codebook import codebook, dynamic8, levels8, search
from veneer.kernels import extension, serving
from veneer.kernels.backends import backend_of, cpu, serve
from veneer.kernels.backends.reference import Reference
from veneer.kernels.coded import CodedWeight, Levels
from veneer.kernels.operation import operation
from veneer.kernels.operations import products, products_int8, quantise
from veneer.kernels.operations.products_int8 import in_8_bits, rows_in_8_bits, unpacked8

pytestmark = pytest.mark.unit

reference = definitions(quantise, products, products_int8)
VARIANTS = [pytest.param(cpu.Cpu(name), id=name) for name in extension.VARIANTS]
every_variant = pytest.mark.parametrize("kernels", VARIANTS)

BLOCKS = st.sampled_from([32, 64, 96, 128, 256, 512, 1024, 2048, 4096])
SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 300)),
    st.tuples(st.sampled_from([1, 3, 64]), st.sampled_from([64, 96, 127, 1024, 4097])),
)
SEEDS = st.integers(0, 99)
# Tables of 16 as their codes have them; the second is neither ascending nor free of equal values, as FP4's is not.
TABLES = {
    "nf4": codebook("nf4"),
    "fp4": torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25, -0.0, -1 / 192, -2 / 3, -1, -1 / 3, -0.5,
                         -1 / 6, -0.25]),
}  # fmt: skip


def _values(size, kind, seed):
    """Weights of a network; of any size at all, subnormal and huge; with blocks of zeros; or all on a tie."""
    drawn = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=drawn)
    if kind == "any":
        exponents = torch.empty(-(-size // 32)).uniform_(-44, 37, generator=drawn)
        return (values.double() * 10.0 ** exponents.repeat_interleave(32)[:size].double()).float().clamp(-3e38, 3e38)
    if kind == "zeros":
        values[torch.rand(size, generator=drawn) < 0.5] = 0
        values[: size // 2] = 0
    if kind == "ties":
        boundaries = (codebook("nf4")[1:] + codebook("nf4")[:-1]) / 2
        values = boundaries[torch.randint(15, (size,), generator=drawn)]
        values[::32] = 1
    return values


KINDS = st.sampled_from(["network", "any", "zeros", "ties"])


def _shifted(tensor, offset):
    """The same values at an address that no vector is aligned to."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    return room[offset:].copy_(tensor.reshape(-1)).view(tensor.shape)


def _ordered(name):
    """Boundaries and order for quantising to a table."""
    values, order = TABLES[name].sort(stable=True)
    return (values[1:] + values[:-1]) / 2, order.to(torch.uint8)


def _weight(shape, table, block, nested, seed, nested_block=256, shift=0):
    """Any codes with any scales, of ``shape``."""
    elements = shape[0] * shape[1]
    drawn = torch.Generator().manual_seed(seed)
    blocks = -(-elements // block)
    codes = torch.randint(256, ((elements + 1) // 2,), generator=drawn, dtype=torch.uint8)
    if not nested:
        scales, rest = torch.rand(blocks, generator=drawn) * 10.0 ** (seed % 7 - 3), (None, None, None)
    else:
        scales = torch.randint(256, (blocks,), generator=drawn, dtype=torch.uint8)
        nested_scales = torch.rand(-(-blocks // nested_block), generator=drawn)
        rest = (dynamic8(), nested_scales, torch.rand((), generator=drawn))
    return CodedWeight(
        _shifted(codes, shift), TABLES[table], _shifted(scales, shift), *rest, block, nested_block, *shape
    )  # fmt: skip


@every_variant
@given(SHAPES, BLOCKS, KINDS, st.sampled_from(list(TABLES)), SEEDS, st.integers(0, 3))
def test_codes_and_scales_are_the_references_bit_for_bit(kernels, shape, block, kind, table, seed, shift):
    values = _shifted(_values(shape[0] * shape[1], kind, seed), shift)
    codes, absmax = kernels.quantise4(values, *_ordered(table), block)
    wanted_codes, wanted_absmax = reference.quantise4(values, *_ordered(table), block)
    assert torch.equal(absmax, wanted_absmax)
    assert torch.equal(codes, wanted_codes)


def _int8(shape, block, nested, seed, nested_block=256, shift=0):
    """A weight of int8 storage."""
    weight = _weight(shape, "nf4", block, nested, seed, nested_block, shift)
    drawn = torch.Generator().manual_seed(seed)
    codes = torch.randint(255, (shape[0] * shape[1],), generator=drawn, dtype=torch.uint8)
    return weight._replace(codes=_shifted(codes, shift), table=None)


@every_variant
@example((3, 64), 32, "infinite", 0, 0)
@given(SHAPES, BLOCKS, KINDS, SEEDS, st.integers(0, 3))
def test_so_are_those_of_int8(kernels, shape, block, kind, seed, shift):
    midpoints = search("int8").midpoints
    values = _shifted(_values(shape[0] * shape[1], kind, seed), shift)
    if kind == "ties":
        drawn = torch.Generator().manual_seed(seed)
        values = midpoints[torch.randint(254, values.shape, generator=drawn)]
        values[::32] = 1
    if kind == "infinite":  # its block's codes mean nothing
        values[70], values[40] = torch.inf, torch.nan
    codes, absmax = kernels.quantise8(values, midpoints, block)
    wanted_codes, wanted_absmax = reference.quantise8(values, midpoints, block)
    torch.testing.assert_close(absmax, wanted_absmax, rtol=0, atol=0, equal_nan=True)
    known = absmax.isfinite().repeat_interleave(block)[: len(codes)]
    assert torch.equal(codes[known], wanted_codes[known])


@every_variant
@given(
    SHAPES, BLOCKS, st.booleans(), SEEDS, st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), st.data(),
)  # fmt: skip
def test_any_rows_of_int8_come_back_as_the_references_do(kernels, shape, block, nested, seed, shift, dtype, data):
    rows, columns = shape
    weight = _int8((rows, columns), block, nested, seed, data.draw(st.sampled_from([1, 16, 256])), shift)
    first = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - first))
    room = torch.full((count * columns + 8,), 7.0, dtype=dtype)
    kernels.dequantise(weight, first, room[4:-4].view(count, columns))
    wanted = torch.empty(count, columns, dtype=dtype)
    reference.dequantise(weight, first, wanted)
    assert torch.equal(room[4:-4].view(count, columns), wanted)
    assert (room[:4] == 7).all()
    assert (room[-4:] == 7).all()


@every_variant
@settings(max_examples=200)
@given(SHAPES, BLOCKS, st.booleans(), SEEDS, st.integers(1, 8), st.integers(0, 3))
def test_the_few_token_product_of_int8_is_exact(kernels, shape, block, nested, seed, tokens, shift):
    rows, columns = shape
    weight = _int8((rows, columns), block, nested, seed, shift=shift)
    x = _shifted(torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)), shift)
    dense = torch.empty(rows, columns)
    reference.dequantise(weight, 0, dense)
    wanted, size = x.double() @ dense.double().t(), x.double().abs() @ dense.double().abs().t()
    for found in (kernels.coded_product(x, weight), reference.coded_product(x, weight)):
        assert found.shape == (tokens, rows)
        assert ((found - wanted).abs() <= 1e-6 * size).all()


@every_variant
@given(st.integers(1, 40000), SEEDS, st.integers(0, 3))
def test_the_nearest_of_256_is_the_references_and_a_tie_goes_to_the_lower_one(kernels, size, seed, shift):
    drawn = torch.Generator().manual_seed(seed)
    boundaries = search("dynamic8").midpoints
    values = torch.empty(size).uniform_(-1, 1, generator=drawn) ** 3
    some = torch.randint(255, (size,), generator=drawn)
    ties = torch.rand(size, generator=drawn) < 0.3
    values = _shifted(torch.where(ties, boundaries[some], values), shift)
    found = kernels.nearest8(values, boundaries)
    assert torch.equal(found, reference.nearest8(values, boundaries))
    assert torch.equal(found[ties], some[ties].to(torch.uint8))


@every_variant
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 63, 64, 100, 129])
def test_a_value_that_is_not_finite_shows_in_its_blocks_scale_alone(kernels, value, place):
    values = torch.randn(130)
    values[place] = value
    _, absmax = kernels.quantise4(values, *_ordered("nf4"), 64)
    assert (torch.isfinite(absmax) == (torch.arange(3) != place // 64)).all()


@every_variant
@given(
    SHAPES, BLOCKS, st.sampled_from(list(TABLES)), st.booleans(), SEEDS, st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), st.data(),
)  # fmt: skip
def test_any_rows_come_back_as_the_references_do(kernels, shape, block, table, nested, seed, shift, dtype, data):
    rows, columns = shape
    weight = _weight((rows, columns), table, block, nested, seed, data.draw(st.sampled_from([1, 16, 256])), shift)
    first = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - first))
    # What lies around the rows must stay as it is.
    room = torch.full((count * columns + 8,), 7.0, dtype=dtype)
    kernels.dequantise(weight, first, room[4:-4].view(count, columns))
    wanted = torch.empty(count, columns, dtype=dtype)
    reference.dequantise(weight, first, wanted)
    assert torch.equal(room[4:-4].view(count, columns), wanted)
    assert (room[:4] == 7).all()
    assert (room[-4:] == 7).all()


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, 1e-38, 3.4e38, float("inf"), float("nan")])
def test_scales_at_the_ends_of_the_range_do_too(kernels, scale, dtype):
    codes, scales = torch.arange(64, dtype=torch.uint8), torch.full((2,), scale)
    weight = CodedWeight(codes, codebook("nf4"), scales, None, None, None, 64, 256, 2, 64)
    out, wanted = torch.empty(2, 64, dtype=dtype), torch.empty(2, 64, dtype=dtype)
    kernels.dequantise(weight, 0, out)
    reference.dequantise(weight, 0, wanted)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)


@every_variant
@settings(max_examples=200)
@given(SHAPES, BLOCKS, st.sampled_from(list(TABLES)), st.booleans(), SEEDS, st.integers(1, 8), st.integers(0, 3))
def test_the_few_token_product_is_exact(kernels, shape, block, table, nested, seed, tokens, shift):
    rows, columns = shape
    weight = _weight((rows, columns), table, block, nested, seed, shift=shift)
    x = _shifted(torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)), shift)
    dense = torch.empty(rows, columns)
    reference.dequantise(weight, 0, dense)
    wanted, size = x.double() @ dense.double().t(), x.double().abs() @ dense.double().abs().t()
    for found in (kernels.coded_product(x, weight), reference.coded_product(x, weight)):
        assert found.shape == (tokens, rows)
        assert ((found - wanted).abs() <= 1e-6 * size).all()


def _is_in_8_bits(rounded, x):
    """Each group of 32 columns is integers times a 127th of its largest value, the nearest ones to x."""
    groups, found = x.double().view(-1, 32), rounded.double().view(-1, 32)
    steps = groups.abs().amax(dim=1, keepdim=True).clamp(min=1e-35) / 127
    integers = found / steps
    torch.testing.assert_close(integers, integers.round(), rtol=1e-6, atol=0)
    return bool(((found - groups).abs() <= 0.50001 * steps).all())


def _weight8(rows, columns, storage, block, nested, seed, shift=0):
    """A weight as product4_int8 takes it, and its dense values in float64."""
    weight = _weight((rows, columns), "nf4", block, nested, seed, shift=shift)
    levels = Levels(*levels8(storage))
    dense = torch.empty(rows, columns)
    reference.dequantise(weight._replace(table=levels.values.float()), 0, dense)
    return (weight, *levels), dense.double() * levels.step


@every_variant
@settings(max_examples=200)
@example(1, 127, 32, "fp4", False, 92, 3, 0)  # a value that lies in the middle of two
@given(
    st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 5, 7, 18, 127, 128, 129, 131]), BLOCKS,
    st.sampled_from(["nf4", "fp4", "int4"]), st.booleans(), SEEDS, st.integers(1, 8), st.integers(0, 3),
)  # fmt: skip
def test_the_product_in_8_bits_is_that_of_the_rounded_x_and_table(
    kernels, rows, groups, block, storage, nested, seed, tokens, shift
):
    weight, dense = _weight8(rows, groups * 32, storage, block, nested, seed, shift)
    x = _shifted(torch.randn(tokens, groups * 32, generator=torch.Generator().manual_seed(seed)), shift)
    x[:, :32] *= 100  # an outlier makes its own group coarse, no other one
    x[0, -32:] = 0
    rounded = in_8_bits(x).double()
    assert _is_in_8_bits(rounded, x)
    wanted, size = rounded @ dense.t(), rounded.abs() @ dense.abs().t()
    for found in (kernels.product4_int8(x, *weight), reference.product4_int8(x, *weight)):
        assert found.shape == (tokens, rows)
        assert ((found - wanted).abs() <= 1e-6 * size).all()


@every_variant
@given(st.integers(1, 9), st.integers(1, 140), BLOCKS, SEEDS, st.integers(1, 8), st.booleans())
def test_what_is_summed_within_a_group_are_integers(kernels, rows, groups, block, seed, tokens, extreme):
    """With every scale 1 nothing is rounded, and the largest sums of the largest numbers must fit their lanes."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (tokens, groups * 32), generator=drawn).float()
    levels = torch.randint(-127, 128, (16,), generator=drawn, dtype=torch.int8)
    codes = torch.randint(256, (rows * groups * 16,), generator=drawn, dtype=torch.uint8)
    if extreme:
        x, levels = torch.full_like(x, -127.0), torch.full_like(levels, (-127, 127)[seed % 2])
    x[:, ::32] = 127.0  # each group's largest: x is the integers it is rounded to
    scales = torch.ones(-(-rows * groups * 32 // block))
    weight = CodedWeight(codes, None, scales, None, None, None, block, 256, rows, groups * 32)
    dense = levels[torch.stack([codes >> 4, codes & 15], 1).flatten().int()].view(rows, -1)
    wanted = x.to(torch.int64) @ dense.to(torch.int64).t()
    found = kernels.product4_int8(x, weight, levels, 1.0)
    assert torch.equal(found, wanted.float())


@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_of_x_that_is_not_finite_shows_in_its_row_alone(kernels, value):
    weight, _ = _weight8(5, 96, "nf4", 32, False, 0)
    x = torch.randn(3, 96)
    x[1, 40] = value
    for found in (kernels.product4_int8(x, *weight), reference.product4_int8(x, *weight)):
        assert torch.isnan(found[1]).all()
        assert torch.isfinite(found[[0, 2]]).all()


@every_variant
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-39, 1e-36, 1e-34, 1e34])
def test_x_at_the_ends_of_the_range(kernels, size):
    weight, _ = _weight8(5, 64, "nf4", 64, False, 1)
    x = torch.full((1, 64), size)
    found, wanted = kernels.product4_int8(x, *weight), reference.product4_int8(x, *weight)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-37)


@every_variant
@settings(max_examples=100)
@given(st.integers(1, 9), st.integers(1, 140), SEEDS, st.integers(1, 8), st.integers(0, 3), st.booleans())
def test_the_product_of_a_weight_in_8_bits_is_that_of_both_rounded(kernels, rows, groups, seed, tokens, shift, extreme):
    drawn = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(n, groups * 32, generator=drawn) for n in (rows, tokens))
    weight[0] *= 1e3  # a row has a scale of its own
    weight[-1, 1::2] = 0
    if extreme:
        weight, x = torch.full_like(weight, -2.0), torch.full_like(x, 2.0)
    coded = rows_in_8_bits(weight)
    codes, scales, _ = coded
    assert ((unpacked8(coded) - weight).abs() <= 0.5001 * scales[:, None]).all()
    rounded, dense = in_8_bits(x).double(), unpacked8(coded).double()
    wanted, size = rounded @ dense.t(), rounded.abs() @ dense.abs().t()
    for by in (kernels, reference):
        found = by.product8_int8(_shifted(x, shift), _shifted(codes, shift), scales)
        assert ((found - wanted).abs() <= 1e-6 * size).all()


@every_variant
def test_a_prepared_product_checks_what_it_is_given(kernels):
    (weight, *levels), _ = _weight8(4, 64, "nf4", 64, True, 0)
    product = kernels.prepared_int8(weight, Levels(*levels))
    x = torch.randn(64, 2).t()  # not contiguous
    torch.testing.assert_close(
        product(x), kernels.product4_int8(x.contiguous(), weight, *levels), rtol=0, atol=0
    )  # fmt: skip
    with pytest.raises(ValueError, match="1 to 8 rows of x, not 9"):
        product(torch.randn(9, 64))
    with pytest.raises(ValueError, match=r"^x must be of shape"):
        product(torch.randn(2, 32))
    with pytest.raises(ValueError, match="a multiple of 32 columns, not 48"):
        kernels.product4_int8(torch.randn(1, 48), weight._replace(columns=48), *levels)
    with pytest.raises(ValueError, match=r"^levels must be torch\.int8"):
        kernels.product4_int8(torch.randn(1, 64), weight, levels[0].float(), levels[1])
    with pytest.raises(ValueError, match=r"^codes must be torch\.uint8, .* at least 160 elements"):
        kernels.prepared_int8(weight._replace(rows=5), Levels(*levels))


@every_variant
def test_many_threads_compute_what_one_does(kernels):
    weight = _weight((513, 768), "nf4", 64, True, 0)
    weight8, _ = _weight8(513, 768, "nf4", 64, True, 0)
    int8 = _int8((513, 768), 64, True, 0)
    x = torch.randn(3, 768)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = torch.empty(513, 768)
            kernels.dequantise(weight, 0, out)
            products = (
                kernels.coded_product(x, weight), kernels.product4_int8(x, *weight8), kernels.coded_product(x, int8),
            )  # fmt: skip
            out8 = torch.empty(513, 768)
            kernels.dequantise(int8, 0, out8)
            codes = (
                *kernels.quantise4(out.view(-1), *_ordered("nf4"), 64),
                *kernels.quantise8(out.view(-1), search("int8").midpoints, 64),
            )  # fmt: skip
            found.append((*products, out, out8, *codes))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@every_variant
def test_what_does_not_fit_is_refused_before_an_address_is_passed_on(kernels):
    weight = _weight((4, 64), "nf4", 64, True, 0)
    out = torch.empty(4, 64)
    with pytest.raises(ValueError, match=r"^Rows 1 to 5 of 64 columns are not in a weight of 4 × 64"):
        kernels.dequantise(weight, 1, out)
    with pytest.raises(ValueError, match=r"^scales must be torch\.float32"):
        kernels.dequantise(weight._replace(nested_table=None, nested_scales=None, offset=None), 0, out)
    with pytest.raises(ValueError, match=r"^boundaries must be of shape"):
        kernels.nearest8(torch.randn(9), torch.zeros(254))
    with pytest.raises(ValueError, match="a multiple of 32 elements, not 48"):
        kernels.quantise4(torch.randn(96), *_ordered("nf4"), 48)
    with pytest.raises(ValueError, match="a power of two, not 100"):
        kernels.dequantise(weight._replace(nested_block=100), 0, out)
    with pytest.raises(ValueError, match="1 to 8 rows of x, not 9"):
        kernels.coded_product(torch.randn(9, 64), weight)
    with pytest.raises(ValueError, match=r"^x must be torch\.float32"):
        kernels.coded_product(torch.randn(1, 64).double(), weight)
    with pytest.raises(ValueError, match=r"^codes must be torch\.uint8, .* at least 320 elements, not .*\(256,\)"):
        kernels.dequantise(_int8((4, 64), 64, True, 0)._replace(rows=5), 1, out)
    with pytest.raises(ValueError, match=r"^codes must be torch\.uint8, .* at least 320 elements, not .*\(256,\)"):
        kernels.coded_product(torch.randn(1, 64), _int8((4, 64), 64, False, 0)._replace(rows=5))
    with pytest.raises(ValueError, match="1 to 8 rows of x, not 9"):
        kernels.coded_product(torch.randn(9, 64), _int8((4, 64), 64, False, 0))
    with pytest.raises(ValueError, match=r"^boundaries must be of shape"):
        kernels.quantise8(torch.randn(64), torch.zeros(253), 64)
    codes, scales, _ = rows_in_8_bits(torch.randn(3, 64))
    with pytest.raises(ValueError, match="1 to 8 rows of x, not 9"):
        kernels.product8_int8(torch.randn(9, 64), codes, scales)
    with pytest.raises(ValueError, match="a multiple of 32 columns, not 48"):
        kernels.product8_int8(torch.randn(1, 48), codes, scales)
    with pytest.raises(ValueError, match=r"^codes must be of shape"):
        kernels.product8_int8(torch.randn(1, 160), codes, scales)
    with pytest.raises(ValueError, match=r"^weight must be torch\.float32, contiguous"):
        kernels.quantise4(torch.randn(96)[::2], *_ordered("nf4"), 32)


def test_the_operators_keep_torchs_contracts():
    weight, int8 = _weight((5, 64), "nf4", 64, True, 0), _int8((5, 64), 64, True, 0)
    coded8, levels, step = _weight8(5, 64, "nf4", 64, True, 0)[0]
    rows8 = rows_in_8_bits(torch.randn(5, 64))
    check, x = torch.library.opcheck, torch.randn(2, 64)
    check(quantise.quantise4.operator, (torch.randn(130), *_ordered("nf4"), 64))
    check(quantise.quantise8.operator, (torch.randn(130), search("int8").midpoints, 64))
    check(quantise.nearest8.operator, (torch.randn(130), search("dynamic8").midpoints))
    for coded in (weight, int8):
        check(products.dequantise.operator, (*coded, 1, torch.empty(3, 64)))
        check(products.coded_product.operator, (x, *coded))
    check(products_int8.product4_int8.operator, (x, *coded8, levels, step))
    check(products_int8.product8_int8.operator, (x, rows8.codes, rows8.scales))


def test_a_compiled_function_calls_them():
    weight = _weight((5, 64), "nf4", 64, True, 0)

    def doubled(x):
        return products.coded_product(x * 2, weight)

    x = torch.randn(2, 64)
    assert torch.equal(torch.compile(doubled, backend="aot_eager", fullgraph=True)(x), doubled(x))


def _in_a_process(code, kernels):
    environment = {**os.environ, extension.VARIABLE: kernels}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["reference", *extension.VARIANTS])
def test_a_variant_can_be_forced(name):
    code = "from veneer.kernels.serving import serving; print(serving())"
    assert _in_a_process(code, name).stdout == f"{name}\n"


def test_one_that_the_machine_cannot_run_is_refused(monkeypatch):
    monkeypatch.setenv(extension.VARIABLE, "avx1024")
    with pytest.raises(ConfigError, match=r"^VENEER_KERNELS is 'avx1024', which this machine cannot run\. It can"):
        extension.chosen()
    monkeypatch.setattr(extension, "VARIANTS", ())
    monkeypatch.setattr(extension, "MISSING", "they were not built")
    with pytest.raises(ConfigError, match=r"run reference \(no C\+\+ kernels: they were not built\)\.$"):
        extension.chosen()
    monkeypatch.delenv(extension.VARIABLE)
    assert extension.chosen() == "reference"


def test_without_the_cpp_kernels_the_line_says_why(monkeypatch):
    monkeypatch.setattr(serving, "MISSING", "they were not built")
    before = backend_of("cpu")
    serve("cpu", Reference())
    try:
        assert serving.serving_line() == "plain PyTorch (they were not built)"
    finally:
        serve("cpu", before)


def test_it_is_refused_each_time_that_something_of_veneer_is_asked_for():
    code = """
import veneer
for _ in range(2):
    try:
        veneer.load
    except veneer.VeneerError as error:
        print(str(error).partition(",")[0])
"""
    assert _in_a_process(code, "avx1024").stdout == 2 * "VENEER_KERNELS is 'avx1024'\n"


def _fake_tenfold(x):
    return torch.empty_like(x)


@operation("(Tensor x) -> Tensor", fake=_fake_tenfold)
def tenfold(x):
    """Ten times x."""
    return 10 * x


class _Partial(Reference):
    """A backend that has a kernel for one operation, and multiplies no few rows by a kernel of its own."""

    name = "partial"

    def kernels(self):
        return (tenfold.by(lambda x: x * 100),)

    def few_rows(self, dtype):
        return 0


def test_a_backend_serves_what_it_has_kernels_for_and_the_definitions_serve_the_rest():
    before = backend_of("cpu")
    x, weight = torch.randn(2, 64), _weight((5, 64), "nf4", 64, True, 0)
    assert torch.equal(tenfold(x), 10 * x)
    serve("cpu", _Partial())
    try:
        assert serving.serving() == "partial"
        assert torch.equal(tenfold(x), 100 * x)
        assert torch.equal(products.coded_product(x, weight), reference.coded_product(x, weight))
    finally:
        serve("cpu", before)
    assert torch.equal(tenfold(x), 10 * x)
    assert torch.equal(products.coded_product(x, weight), before.coded_product(x, weight))


def test_a_device_without_a_backend_is_served_by_the_definitions():
    assert serving.serving("another") == "reference"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what a process has loaded")
def test_the_process_has_one_openmp_runtime():
    """A second one would spin against the first for the same cores."""
    code = """
import torch
from veneer.kernels.backends import cpu
torch.randn(512, 512) @ torch.randn(512, 512)
print(len({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}))
"""
    assert _in_a_process(code, "").stdout == "1\n"
