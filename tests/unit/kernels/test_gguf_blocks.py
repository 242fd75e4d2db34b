"""Every variant of the blocks of a GGUF file that this machine runs, and their definition, against gguf's own bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from veneer.kernels import extension
from veneer.kernels.backends import cpu
from veneer.kernels.operations.gguf_blocks import KINDS, gguf_blocks

pytestmark = pytest.mark.unit

KERNELS = [pytest.param(cpu.Cpu(name).gguf_blocks, id=name) for name in extension.VARIANTS]
EVERY = {"reference": gguf_blocks.definition} | {name: cpu.Cpu(name).gguf_blocks for name in extension.VARIANTS}
SHAPES = st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96, 288]))
# Any number, and those that meet in ties: multiples of an eighth, of which many are equal and far from none.
ANY = st.floats(width=32, allow_nan=False)
NUMBERS = st.one_of(ANY, st.integers(-160, 160).map(lambda n: n / 8), st.floats(-3, 3, width=32))


def by_gguf(values, kind):
    with np.errstate(all="ignore"):
        return gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def one(*values):
    """A block that begins with these."""
    block = np.zeros((1, 32), np.float32)
    block[0, : len(values)] = values
    return block


@example(one())
@example(one(127, 0.5, -0.5, 1.5, 2.5, -2.5, np.nextafter(np.float32(0.5), np.float32(0))))
@example(one(-8, 0.5, -0.5, 1.5, 7.5, 8))
@example(one(8, -8, 3))  # the first of the two that are farthest from 0
@example(one(np.inf, 1, -2))
@example(one(-np.inf, np.inf))
@example(one(np.nan, 1, -2))
@example(one(1e-45, -3e-45, 7e-45))
@example(one(1e-38, 3e-39, -5e-39))
@example(one(3.4e38, -3.4e38, 1e38))
@example(one(127 * 2.0**-15, 1e-6))  # a step that fp16 keeps with fewer bits
@given(values=SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=NUMBERS)))
def test_the_bytes_are_ggufs(values):
    for kind, (_, least) in KINDS.items():
        # Whether the least of -0.0 and 0.0 is the first or the second is NumPy's affair.
        numbers = values + np.float32(0) if least else values
        wanted = by_gguf(numbers, kind)
        for name, kernel in EVERY.items():
            made = kernel(torch.from_numpy(numbers), kind).numpy()
            np.testing.assert_array_equal(made, wanted, err_msg=f"{kind} by {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_share_the_blocks(kernel, kind):
    values = torch.randn(67, 800, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(kernel(values, kind).numpy(), by_gguf(values.numpy(), kind))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_does_not_fit_is_refused(kernel):
    with pytest.raises(ValueError, match=r"^Rows of 48 values are not in blocks of 32"):
        kernel(torch.zeros(2, 48), "Q8_0")
    with pytest.raises(ValueError, match=r"^values must be torch\.float32, contiguous"):
        kernel(torch.zeros(2, 64)[:, ::2], "Q8_0")


def test_the_operator_keeps_torchs_contracts():
    for kind in KINDS:
        torch.library.opcheck(gguf_blocks.operator, (torch.randn(3, 64), kind))
