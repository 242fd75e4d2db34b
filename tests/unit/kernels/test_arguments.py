"""Arguments that do not fit each other: a kernel computes what the definition computes, or refuses them."""

from __future__ import annotations

import ctypes
import mmap
import random

import pytest
import torch

from veneer.errors import VeneerError
from veneer.frozen.codebook import codebook, dynamic8
from veneer.kernels import extension
from veneer.kernels.backends.cpu import Cpu
from veneer.kernels.coded import CodedWeight
from veneer.kernels.operation import Operation
from veneer.kernels.operations import (
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
from veneer.kernels.operations.products_int8 import rows_in_8_bits

if extension.VARIANTS:
    from veneer.kernels import _cpu

pytestmark = pytest.mark.unit

every_variant = pytest.mark.parametrize("kernels", [pytest.param(Cpu(name), id=name) for name in extension.VARIANTS])
ROWS, COLUMNS, BLOCK = 6, 64, 32


def _drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _weight():
    codes = torch.arange(ROWS * COLUMNS // 2, dtype=torch.uint8)
    return CodedWeight(codes, codebook("nf4"), _drawn(ROWS * COLUMNS // BLOCK).abs(), None, None, None, BLOCK, 256,
                       ROWS, COLUMNS)  # fmt: skip


def _boundaries(values):
    return (values[1:] + values[:-1]) / 2


def _calls():
    """The arguments of each operation, right ones."""
    x, grad = _drawn(4, COLUMNS), _drawn(4, ROWS)
    A, B = _drawn(3, COLUMNS), _drawn(ROWS, 3)
    bytes_of = rows_in_8_bits(_drawn(ROWS, COLUMNS))
    heads, angles = _drawn(2, 3, 5, 8), _drawn(2, 5, 8)
    return {
        quantise.quantise4: (_drawn(160), _boundaries(codebook("nf4")), torch.arange(16, dtype=torch.uint8), BLOCK),
        quantise.quantise8: (_drawn(160), torch.linspace(-1, 1, 254), BLOCK),
        quantise.nearest8: (_drawn(40), _boundaries(dynamic8())),
        gguf_blocks.gguf_blocks: (_drawn(3, 64), "Q5_1"),
        products.coded_product: (x, _weight()),
        products_int8.product8_int8: (x, bytes_of.codes, bytes_of.scales),
        norm.rms_norm: (_drawn(2, 3, 8), _drawn(8), 1e-5, False),
        norm.rms_norm_backward: (_drawn(2, 3, 8), _drawn(2, 3, 8), _drawn(2, 3, 1), _drawn(8), False),
        gates.swiglu: (_drawn(6, 8), _drawn(6, 8)),
        gates.swiglu_backward: (_drawn(6, 8), _drawn(6, 8), _drawn(6, 8)),
        gates.geglu: (_drawn(6, 8), _drawn(6, 8)),
        gates.geglu_backward: (_drawn(6, 8), _drawn(6, 8), _drawn(6, 8)),
        update.update_product: (x, A, B, 0.5, _drawn(4, ROWS)),
        update.update_product_backward: (grad, x, x @ A.T, A, B, 0.5, _drawn(4, COLUMNS)),
        rotation.rotate: (heads, angles, angles.flip(0), False),
        cross_entropy.cross_entropy: (_drawn(6, 8), torch.arange(6), 0.1),
        cross_entropy.cross_entropy_gradient: (_drawn(6, 8), torch.arange(6), 0.1),
    }


def _in_bf16(operation, arguments):
    """Of an operation that is written for these, too."""
    kept = 2 if operation is norm.rms_norm_backward else None  # what a norm divided by
    return tuple(
        value.bfloat16() if place != kept and isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for place, value in enumerate(arguments)
    )


_PASSES = {
    value
    for module in (gates, norm, rotation, cross_entropy)
    for value in vars(module).values()
    if isinstance(value, Operation)
}
CALLS = {operation.name.partition("::")[2]: (operation, arguments) for operation, arguments in _calls().items()}
CALLS |= {
    f"{name} in bf16": (operation, _in_bf16(operation, arguments))
    for name, (operation, arguments) in CALLS.items()
    if operation in _PASSES
}


def _other_shape(tensor, rng):
    """A tensor of some other shape, of as many elements where that can be."""
    shape = list(tensor.shape)
    ways = ["more", "less"] + (["across", "one", "flat"] if len(shape) > 1 else ["deeper"])
    way, place = rng.choice(ways), rng.randrange(len(shape))
    if way == "across":
        return tensor.reshape([*shape[:-2], shape[-1], shape[-2]])
    if way == "flat":
        return tensor.reshape(-1)
    if way == "deeper":
        return tensor.reshape(1, -1)
    shape[place] = 1 if way == "one" else shape[place] + (1 if way == "more" else -1)
    rest = torch.arange(max(1, torch.Size(shape).numel())) % max(1, tensor.numel())
    return tensor.reshape(-1)[rest[: torch.Size(shape).numel()]].reshape(shape)


def _outcome(call, arguments):
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    try:
        made = call(*copies)
    except (ValueError, RuntimeError, IndexError, VeneerError):
        return None
    return [*(made if isinstance(made, tuple) else (made,)), *(c for c in copies if isinstance(c, torch.Tensor))]


@every_variant
@pytest.mark.parametrize("call", CALLS)
def test_what_does_not_fit_is_refused_or_computed_as_defined(kernels, call):
    operation, right = CALLS[call]
    run = getattr(kernels, operation.definition.__name__)
    within = 2e-2 if "bf16" in call else 1e-4
    assert _outcome(run, right) is not None
    rng = random.Random(0)
    places = [place for place, value in enumerate(right) if isinstance(value, torch.Tensor)]
    for _ in range(40):
        arguments = list(right)
        for place in rng.sample(places, rng.choice([1, 1, 2]) if len(places) > 1 else 1):
            arguments[place] = _other_shape(arguments[place], rng)
        made = _outcome(run, arguments)
        if made is None:
            continue
        shapes = [tuple(value.shape) for value in arguments if isinstance(value, torch.Tensor)]
        defined = _outcome(operation.definition, arguments)
        assert defined is not None, f"computed where the definition refuses: {shapes}"
        for own, other in zip(made, defined, strict=True):
            assert own.shape == other.shape, shapes
            torch.testing.assert_close(own, other, rtol=within, atol=within, msg=str(shapes))


@every_variant
@pytest.mark.parametrize(
    ("first", "shape"), [(5, (2, COLUMNS)), (-1, (1, COLUMNS)), (0, (1, COLUMNS - 2)), (0, (1, COLUMNS + 1))]
)
def test_rows_that_a_weight_has_not_are_not_expanded(kernels, first, shape):
    with pytest.raises(ValueError, match=f"columns are not in a weight of {ROWS} × {COLUMNS}"):
        kernels.dequantise(_weight(), first, torch.zeros(shape))


@every_variant
@pytest.mark.parametrize("columns", [5, 7])
def test_no_rows_are_expanded_into_no_memory(kernels, columns):
    """At an odd element, in the middle of a byte; the extension itself writes nothing there, either."""
    weight = _weight()._replace(columns=columns)
    kernels.dequantise(weight, 3, torch.empty(0, columns))
    with _Guarded() as page:
        address = page.end()  # the first byte that nobody may write
        _cpu.dequantise4(kernels.name, weight.codes.data_ptr(), weight.table.data_ptr(), weight.scales.data_ptr(), 0, 0,
                       0, BLOCK, 0, 15, 15, address, False, 1)  # fmt: skip


@every_variant
def test_sines_for_fewer_rows_than_the_cosines_are_refused(kernels):
    x, angles = _drawn(2, 3, 5, 8), _drawn(2, 5, 8)
    with pytest.raises(ValueError, match=r"sines must be of shape \(2, 5, 8\), not \(1, 5, 8\)"):
        kernels.rotate(x, angles, angles[:1], False)


class _Guarded:
    """A page, and one behind it that cannot be read or written."""

    def __enter__(self):
        self.pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        self.first = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(self.end()), mmap.PAGESIZE, 0) == 0
        return self

    def end(self):
        return self.first + mmap.PAGESIZE

    def __exit__(self, *error):
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.end()), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
