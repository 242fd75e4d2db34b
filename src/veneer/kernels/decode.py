"""A step of generation through a whole model of Llama's kind, in one call of the C++ extension (csrc/decode.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels.backends.cpu import Cpu, check, check_levels, coded_addresses
from veneer.kernels.backends.reference import FEW
from veneer.kernels.coded import CodedWeight, EightBits, Levels
from veneer.kernels.extension import VARIANTS
from veneer.kernels.operations.products_int8 import stride8

if VARIANTS:
    from veneer.kernels import _cpu


def takes_heads_of(dim: int) -> bool:
    """Whether its attention takes heads of so many dimensions: whole vectors, and not too many for the registers."""
    return dim % 16 == 0 and dim <= 256


class Linear(NamedTuple):
    """x → W x + b + Σ s · B A x: a weight (rows, columns), a bias (rows,), and A, B and s of each update; in fp32,
    except for a weight in codes. With ``levels``, of a weight in 4 bits, x is rounded to 8 bits."""

    weight: Tensor | CodedWeight | EightBits
    bias: Tensor | None = None
    updates: tuple[tuple[Tensor, Tensor, float], ...] = ()
    levels: Levels | None = None


class Layer(NamedTuple):
    """The weights of RMSNorm before attention, before the gated layer, of queries and of keys where there are any; the
    linear layers query, key, value, output, gate, up, down."""

    norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    linears: tuple[Linear, ...]


class Decoder:
    """The layers of a model, and the ``keys`` and ``values`` of some sequences, fp32 (layers, sequences, key heads,
    room, dim), which several decoders may share. ``cosines`` and ``sines``, fp32 (room, dim), rotate the positions."""

    def __init__(
        self, kernels: Cpu, layers: list[Layer], norm: Tensor, head: Linear, *, heads: int, key_heads: int, dim: int,
        scaling: float, eps: float, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor,
    ) -> None:  # fmt: skip
        if not takes_heads_of(dim):
            raise ValueError(f"A head has a multiple of 16 and at most 256 dimensions, not {dim}.")
        room = len(cosines)
        sequences = keys.shape[1]
        for name, memory in (("keys", keys), ("values", values)):
            check(name, memory, torch.float32, len(layers) * sequences * key_heads * room * dim)
        self._room, self._sequences, self._hidden = room, sequences, norm.numel()
        # Alive as long as their addresses are used.
        self._kept: list[object] = [layers, norm, head, cosines, sines, keys, values]
        for name, tensor, least in (("cosines", cosines, room * dim), ("sines", sines, room * dim), ("norm", norm, 1)):
            check(name, tensor, torch.float32, least)
        self._vocabulary, made = self._linear(head)
        self._logits = torch.empty(0, self._vocabulary)
        self._decoder = _cpu.Decoder(
            kernels.name, heads, key_heads, dim, room, scaling, eps, cosines.data_ptr(), sines.data_ptr(),
            norm.data_ptr(), made,
        )  # fmt: skip
        widths = (self._hidden, self._hidden, dim, dim)
        for layer, layer_keys, layer_values in zip(layers, keys, values, strict=True):
            for weight, width in zip(layer.norms, widths, strict=True):
                if weight is not None:
                    check("norm", weight, torch.float32, width)
            norms = [0 if weight is None else weight.data_ptr() for weight in layer.norms]
            linears = [self._linear(linear)[1] for linear in layer.linears]
            self._decoder.add_layer(norms, linears, layer_keys.data_ptr(), layer_values.data_ptr())

    def step(self, x: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
        """One token more: of x (tokens, hidden), what the vocabulary's embedding gives, → logits (tokens, vocabulary).

        Token m stands at ``positions[m]`` of ``sequences[m]``, int64 (tokens,) both; the tokens of one sequence come in
        order, and what stands before them has its keys and values. The logits are good until the next step.
        """
        if len(self._logits) < len(x):  # new memory for each step would cost its page faults
            self._logits = torch.empty(len(x), self._vocabulary)
        logits = self._logits[: len(x)]
        if not len(x):
            return logits
        x = x.to(torch.float32, copy=True).contiguous()  # the step works in it
        check("x", x, torch.float32, len(x) * self._hidden)
        for name, places, limit in (("sequences", sequences, self._sequences), ("positions", positions, self._room)):
            check(name, places, torch.int64, len(x))
            low, high = places.aminmax()
            if low < 0 or high >= limit:
                raise ValueError(f"{name} are 0 up to {limit - 1}, not {int(low)} to {int(high)}.")
        for first in range(0, len(x), FEW):
            self._decoder.step(
                x[first:].data_ptr(), sequences[first:].data_ptr(), positions[first:].data_ptr(),
                min(FEW, len(x) - first), logits[first:].data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
        return logits

    def _linear(self, linear: Linear) -> tuple[int, _cpu.Linear]:
        """Its rows, and what the extension takes."""
        weight, levels = linear.weight, linear.levels
        if isinstance(weight, CodedWeight):
            rows, columns = weight.rows, weight.columns
            addresses = coded_addresses(weight, rows * columns)
            if levels is not None:
                check_levels(levels, columns)
            make: Callable[..., _cpu.Linear] = _cpu.Linear.int8
            rounding: tuple[int | float, ...] = ()
            if weight.table is not None:
                make = _cpu.Linear.four_bits
                rounding = (0, 0.0) if levels is None else (levels.values.data_ptr(), levels.step)
            made = make(*addresses, rows, columns, *rounding)
        elif isinstance(weight, EightBits):
            rows, columns = len(weight.scales), weight.columns
            check("codes", weight.codes, torch.uint8, rows * 2 * stride8(columns))
            check("scales", weight.scales, torch.float32, rows)
            made = _cpu.Linear.eight_bits(weight.codes.data_ptr(), weight.scales.data_ptr(), rows, columns)
        else:
            rows, columns = weight.shape
            check("weight", weight, torch.float32, rows * columns)
            made = _cpu.Linear.dense(weight.data_ptr(), rows, columns)
        if linear.bias is not None:
            check("bias", linear.bias, torch.float32, rows)
            made.set_bias(linear.bias.data_ptr())
        for A, B, scale in linear.updates:
            check("A", A, torch.float32, len(A) * columns)
            check("B", B, torch.float32, len(A) * rows)
            made.add_update(A.data_ptr(), B.data_ptr(), len(A), scale)
        return rows, made
