"""Codes, scales, expanded values: the definition's, to the last bit; and products within rounding."""

from __future__ import annotations

import pytest
import torch

from veneer.frozen.codebook import codebook, dynamic8, search
from veneer.kernels.coded import CodedWeight
from veneer.kernels.operations import adapted, products, quantise

pytestmark = pytest.mark.unit

FP4 = torch.tensor(
    [0, 1 / 192, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25, -0.0, -1 / 192, -2 / 3, -1, -1 / 3, -0.5, -1 / 6, -0.25]
)
TABLES = {"nf4": codebook("nf4"), "fp4": FP4, "int4": torch.arange(-8, 8) / 7.0, "int8": None}
TYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [  # shape, storage, block, nested
    ((8, 64), "nf4", 64, True), ((5, 96), "nf4", 64, True), ((7, 127), "fp4", 32, False), ((3, 33), "int4", 96, True),
    ((4, 256), "int8", 64, True), ((3, 37), "int8", 32, False), ((2, 4096), "nf4", 4096, False),
    ((1, 1), "nf4", 32, True), ((2, 1100), "int4", 128, True), ((3, 1280), "fp4", 128, True),
]  # fmt: skip
every_weight = pytest.mark.parametrize(("shape", "storage", "block", "nested"), WEIGHTS)


def weight_of(shape, storage, block, nested, nested_block=4):
    elements = shape[0] * shape[1]
    drawn = torch.Generator().manual_seed(elements)
    blocks = -(-elements // block)
    count = elements if storage == "int8" else (elements + 1) // 2
    codes = torch.randint(255, (count,), generator=drawn).to(torch.uint8)
    if not nested:
        rest = (torch.rand(blocks, generator=drawn), None, None, None)
    else:
        rest = (
            torch.randint(256, (blocks,), generator=drawn).to(torch.uint8), dynamic8(),
            torch.rand(-(-blocks // nested_block), generator=drawn), torch.rand((), generator=drawn),
        )  # fmt: skip
    return CodedWeight(codes, TABLES[storage], *rest, block, nested_block, *shape)


@every_weight
@pytest.mark.parametrize("dtype", TYPES)
def test_expanded_values_are_the_definitions_bits(shape, storage, block, nested, dtype):
    weight = weight_of(shape, storage, block, nested)
    got, wanted = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    products.dequantise(weight, 0, got)
    products.dequantise.definition(weight, 0, wanted)
    assert torch.equal(got, wanted)


@every_weight
def test_so_are_those_of_later_rows_in_a_longer_buffer_and_nothing_beside_them(shape, storage, block, nested):
    weight, first = weight_of(shape, storage, block, nested), shape[0] // 2
    buffer = torch.empty(shape[0] - first, shape[1] + 8, dtype=torch.bfloat16)
    wanted = torch.empty(shape[0] - first, shape[1], dtype=torch.bfloat16)
    products.dequantise(weight, first, buffer[:, : shape[1]])
    products.dequantise.definition(weight, first, wanted)
    assert torch.equal(buffer[:, : shape[1]], wanted)
    assert buffer[:, shape[1] :].isnan().all()


def test_other_types_and_layouts_are_the_definitions():
    weight = weight_of((4, 64), "nf4", 64, True)
    wanted = torch.empty(4, 64)
    products.dequantise.definition(weight, 0, wanted)
    for got in (torch.empty(4, 64, dtype=torch.float64), torch.empty(64, 4).t()):
        products.dequantise(weight, 0, got)
        assert torch.equal(got.float(), wanted)


def test_rows_outside_a_weight_are_refused():
    with pytest.raises(ValueError, match="Rows 3 to 5 of 64 columns are not in a weight of 4 × 64"):
        products.dequantise(weight_of((4, 64), "nf4", 64, True), 3, torch.empty(2, 64))


def test_codes_too_few_are_refused():
    weight = weight_of((4, 64), "nf4", 64, True)
    with pytest.raises(ValueError, match="codes must be"):
        products.dequantise(weight._replace(codes=weight.codes[:-1]), 0, torch.empty(4, 64))


def values_of(size, kind):
    drawn = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=drawn)
    if kind == "ties":
        boundaries = (codebook("nf4")[1:] + codebook("nf4")[:-1]) / 2
        values = boundaries[torch.randint(15, (size,), generator=drawn)]
        values[::32] = 1
    if kind == "any":
        values *= 10.0 ** torch.randint(-44, 38, (size,), generator=drawn).double()
        values = values.float().clamp(-3e38, 3e38)
    if kind == "zeros":
        values[: size // 2] = 0
    return values


every_value = pytest.mark.parametrize(
    ("size", "block", "kind"),
    [(512, 64, "network"), (801, 64, "ties"), (1000, 96, "any"), (515, 128, "zeros"), (4099, 4096, "any"),
     (1, 32, "network")],
)  # fmt: skip


@every_value
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_codes_and_scales_are_the_definitions_bits(size, block, kind, table):
    ascending, order = TABLES[table].sort(stable=True)
    arguments = values_of(size, kind), (ascending[1:] + ascending[:-1]) / 2, order.to(torch.uint8), block
    for got, wanted in zip(quantise.quantise4(*arguments), quantise.quantise4.definition(*arguments), strict=True):
        assert torch.equal(got, wanted)


@every_value
def test_so_are_those_of_8_bits(size, block, kind):
    arguments = values_of(size, kind), search("int8").midpoints, block
    for got, wanted in zip(quantise.quantise8(*arguments), quantise.quantise8.definition(*arguments), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_in_its_blocks_scale(bad):
    values = values_of(128, "network")
    values[70] = bad
    midpoints = search("int8").midpoints
    _, absmax = quantise.quantise8(values, midpoints, 64)
    assert absmax[0].isfinite()
    assert torch.equal(absmax[1:], torch.tensor([bad]).abs()) or absmax[1].isnan()


def test_the_nearest_of_256_are_the_definitions():
    values, boundaries = values_of(5000, "network"), torch.linspace(-2, 2, 255)
    values[:255] = boundaries
    assert torch.equal(quantise.nearest8(values, boundaries), quantise.nearest8.definition(values, boundaries))


@every_weight
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float32), (16, torch.bfloat16), (3, torch.float16)])
def test_the_product_of_few_rows(shape, storage, block, nested, tokens, dtype):
    weight = weight_of(shape, storage, block, nested)
    x = torch.randn(shape[1], tokens, generator=torch.Generator().manual_seed(1)).to(dtype).t()
    got = products.coded_product(x, weight)
    expanded = torch.empty(shape, dtype=dtype)
    products.dequantise.definition(weight, 0, expanded)
    exact = x.double() @ expanded.double().t()
    bound = x.double().abs() @ expanded.double().abs().t()
    assert got.dtype is dtype
    assert ((got.double() - exact).abs() <= 1e-6 * bound + torch.finfo(dtype).eps * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("tokens", [5, 17])
def test_with_an_update_few_rows_and_many_are_the_definition(tokens):
    weight = weight_of((24, 96), "nf4", 32, True)
    drawn = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 96, generator=drawn).bfloat16()
    bias, A, B = (torch.randn(*shape, generator=drawn) for shape in ((24,), (4, 96), (24, 4)))
    for update in ((None, None), (A, B)):
        got = adapted.product_with_update_coded(x, weight, bias, *update, 0.5)
        wanted = adapted.product_with_update_coded.definition(x, weight, bias, *update, 0.5)
        for one, other in zip(got, wanted, strict=True):
            assert one.shape == other.shape
            assert (one - other).float().norm() <= 2**-7 * other.float().norm()
