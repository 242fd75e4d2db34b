"""Operations that only a GPU's kernels compute so far: their definitions, and their contracts as operators."""

from __future__ import annotations

import pytest
import torch

from veneer.kernels.operations import adamw, norm, residual_norm

pytestmark = pytest.mark.unit


def test_adamw_is_torchs():
    parameter = torch.nn.Parameter(torch.randn(500, generator=torch.Generator().manual_seed(0)))
    values, mean, square = parameter.detach().clone(), torch.zeros(500), torch.zeros(500)
    optimizer = torch.optim.AdamW([parameter], 1e-2, weight_decay=0.1)
    for step in range(1, 6):
        parameter.grad = torch.randn(500, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        adamw.adamw(values, parameter.grad, mean, square, 1e-2, 0.9, 0.999, 1e-8, 0.1, step)
    assert (values - parameter.detach()).norm() <= 1e-6 * values.norm()


@pytest.mark.parametrize("once", [False, True])
def test_the_norm_of_a_sum_has_the_gradient_that_autograd_gives(once):
    x, residual, weight, grad, grad_total = (torch.randn(3, 8, dtype=torch.float64) for _ in range(5))
    weight = weight[0]
    leaf = x.clone().requires_grad_()
    sum_of_both = leaf + residual
    normed = weight * sum_of_both / (sum_of_both.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    (normed * grad + sum_of_both * grad_total).sum().backward()
    total, y, inverse = residual_norm.add_rms_norm(x, residual, weight, 1e-5, once)
    torch.testing.assert_close(y, normed.detach())
    got = residual_norm.add_rms_norm_backward(grad, grad_total, total, inverse, weight, once)
    torch.testing.assert_close(got, leaf.grad)
    assert torch.equal(y, norm.rms_norm(total, weight, 1e-5, once)[0])


def test_torch_accepts_them():
    x, weight = torch.randn(3, 8), torch.randn(8)
    total, _, inverse = residual_norm.add_rms_norm(x, x, weight, 1e-5, False)
    torch.library.opcheck(residual_norm.add_rms_norm.operator, (x, x, weight, 1e-5, False))
    torch.library.opcheck(residual_norm.add_rms_norm_backward.operator, (x, x, total, inverse, weight, False))
    moments = torch.rand(20), torch.rand(20)
    torch.library.opcheck(
        adamw.adamw.operator, (torch.rand(20), torch.rand(20), *moments, 1e-3, 0.9, 0.999, 1e-8, 0.1, 3)
    )  # fmt: skip
