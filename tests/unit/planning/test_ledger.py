"""What an operator costs, by its name and tensors."""

from __future__ import annotations

import pytest
import torch

from veneer.kernels.operations import adapted
from veneer.planning.ledger import cost

pytestmark = pytest.mark.unit


def test_a_product_with_an_update_costs_what_those_by_its_weight_alone_do():
    x, W, A, B = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((7, 40), (60, 40), (3, 40), (60, 3)))
    y, low = adapted.product_with_update(x, W, None, A.float(), B.float(), 2.0)
    forward = cost(torch.ops.veneer.product_with_update.default, [x, W, A, B], [y, low])
    alone = cost(torch.ops.aten.mm.default, [x, W.t()], [y])
    assert forward[:2] == alone[:2] == ("products in 16 bits", 2 * 7 * 40 * 60)
    made = list(adapted.product_with_update_backward(y, W, x, low, A.float(), B.float(), 2.0, True, True))
    backward = cost(torch.ops.veneer.product_with_update_backward.default, [y, W, x, low, A, B], made)
    assert backward[:2] == alone[:2]
    made = list(adapted.product_with_update_backward(y, W, x, low, A.float(), B.float(), 2.0, False, True))
    assert cost(torch.ops.veneer.product_with_update_backward.default, [y, W, x, low, A, B], made)[1] == 0
