"""The tables that 4-bit and 8-bit codes stand for, computed from their definitions."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# NF4's published table (Dettmers et al., 2023, arXiv:2305.14314, appendix E). Its definition, quantiles of the normal
# distribution, gives it to 2e-7 only; files of other tools are read exactly with these very bits.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def nf4() -> Tensor:
    """The 16 values of 4-bit NormalFloat, ascending, fp32."""
    return torch.tensor(_NF4, dtype=torch.float32)


def nf4_from_definition() -> Tensor:
    """NF4 by its definition: quantiles of N(0, 1), eight positive, seven negative, and 0; in fp64."""
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return values / values.max()


@cache
def dynamic8() -> Tensor:
    """The 256 values of the signed dynamic 8-bit map (Dettmers, 2015, arXiv:1511.04561), ascending, fp32.

    For each decimal exponent i − 6 the midpoints of 2^i equal steps of [0.1, 1], with both signs; and 0 and 1.
    """
    values = [torch.zeros(1), torch.ones(1)]
    for i in range(7):
        steps = torch.linspace(0.1, 1, 2**i + 1)
        midpoints = (steps[:-1] + steps[1:]) / 2 * 10.0 ** (i - 6)
        values += [midpoints, -midpoints]
    return torch.cat(values).sort().values
