"""The tables that 4-bit and 8-bit codes stand for, computed from their definitions where these give the very bits."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# NF4's published table (Dettmers et al., 2023, arXiv:2305.14314, appendix E). Its definition, quantiles of the normal
# distribution, gives it to 2e-7 only; files of other tools are read exactly with these very bits.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def codebook(storage: str) -> Tensor:
    """The value of each code of ``storage`` (nf4, fp4, int4 or int8), fp32 (codes,), the largest of them 1."""
    if storage == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    if storage == "fp4":
        return _fp4()
    largest = {"int4": 7, "int8": 127}[storage]
    return torch.arange(-largest, largest + 1, dtype=torch.float32) / largest


@cache
def levels8(storage: str) -> tuple[Tensor, float]:
    """The codebook of a 4-bit ``storage`` in 8 bits: int8 (16,), and the step that multiplies them.

    The step is the one of 1/64 … 1/127 with the smallest rounding error: 0.3 % for NF4, 0.2 % for FP4, none for INT4.
    """
    values = codebook(storage).double()
    errors = [float(((values * n).round() / n - values).square().mean()) for n in range(64, 128)]
    n = 64 + min(range(64), key=errors.__getitem__)
    return pad((values * n).round().to(torch.int8), (0, 16 - len(values))), 1 / n


def nf4_from_definition() -> Tensor:
    """NF4 by its definition: quantiles of N(0, 1), eight positive, seven negative, and 0; in fp64."""
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return values / values.max()


def _fp4() -> Tensor:
    """A sign, two bits of exponent e and one of mantissa m: (1 + m/2) · 2^(4 − e), or m/16 where e = 0; over 12."""
    sizes = [(1 + m / 2) * 2.0 ** (4 - e) if e else m / 16 for e in range(4) for m in range(2)]
    values = torch.tensor(sizes + [-size if size else 0.0 for size in sizes])
    return values / values.max()


@cache
def dynamic8(signed: bool = True, device: torch.device | None = None) -> Tensor:
    """The 256 values of the dynamic 8-bit map (Dettmers, 2015, arXiv:1511.04561), ascending, fp32, on ``device``, by
    default the CPU.

    For each decimal exponent i − 6 the midpoints of 2^i equal steps of [0.1, 1], with both signs, or of 2^(i + 1)
    steps, all positive; and 0 and 1.
    """
    if device is not None:
        return dynamic8(signed).to(device)
    values = [torch.zeros(1), torch.ones(1)]
    for i in range(7):
        steps = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        midpoints = (steps[:-1] + steps[1:]) / 2 * 10.0 ** (i - 6)
        values += [midpoints, -midpoints] if signed else [midpoints]
    return torch.cat(values).sort().values


class Search(NamedTuple):
    """How the nearest code is found: the midpoints between neighbouring values, and the codes in their order."""

    midpoints: Tensor  # fp32 (codes − 1,)
    codes: Tensor  # uint8 (codes,)

    def nearest(self, values: Tensor, places: Tensor, codes: Tensor) -> Tensor:
        """``codes`` (n,), uint8, filled with those of the nearest entries to ``values`` (n,); a tie goes to the lower
        one. ``places`` (n,), int32, is room to work in."""
        torch.bucketize(values, self.midpoints, out_int32=True, out=places)
        return torch.index_select(self.codes, 0, places, out=codes)


@cache
def search(storage: str, device: torch.device | None = None) -> Search:
    """For a storage's codebook, or "dynamic8", or "dynamic8 unsigned"; on ``device``, by default the CPU."""
    if device is not None:
        return Search(*(tensor.to(device) for tensor in search(storage)))
    table = dynamic8(storage == "dynamic8") if storage.startswith("dynamic8") else codebook(storage)
    order = torch.argsort(table, stable=True)
    ascending = table[order]
    midpoints, codes = (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)
    if storage == "int4":  # one value less than 4 bits have; the kernels take sixteen, the last one never reached
        midpoints, codes = pad(midpoints, (0, 1), value=math.inf), pad(codes, (0, 1))
    return Search(midpoints, codes)
