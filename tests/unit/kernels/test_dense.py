"""The products of fp32 matrices by oneDNN are the products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from veneer.kernels.dense import linear

pytestmark = pytest.mark.unit

sizes = st.integers(0, 40)


def _matrix(rows: int, columns: int, transposed: bool) -> torch.Tensor:
    return torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)


@given(rows=sizes, inner=sizes, out=sizes, turned=st.tuples(st.booleans(), st.booleans()), with_bias=st.booleans())
def test_linear_equals_the_product_in_double_precision(rows, inner, out, turned, with_bias):
    x, weight = _matrix(rows, inner, turned[0]), _matrix(out, inner, turned[1])
    bias = torch.randn(out) if with_bias else None
    y = linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.shape == (rows, out)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6 * max(1.0, inner**0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_keep_torchs_product(dtype):
    x, weight = torch.randn(5, 7, dtype=dtype), torch.randn(3, 7, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
