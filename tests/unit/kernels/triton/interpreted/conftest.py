"""The interpreter made to compute as a GPU does. It runs kernels where TRITON_INTERPRET is set before triton loads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from veneer.kernels.backends import backend_of, serve
from veneer.kernels.backends.triton import Triton


def _rounded(values, source, target, mode, own=interpreter._convert_float):
    """fp32 → bf16 to the nearest, ties to even, where the interpreter cuts off."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return own(values, source, target, mode)
    exact = torch.from_numpy(np.array(values).view(np.float32))
    return exact.bfloat16().view(torch.int16).numpy().view(np.uint16)


def _no_arithmetic_on_bits(self, left, right, function, own=interpreter.InterpreterBuilder.binary_op):
    """bf16 is stored as integers there, and multiplied as these."""
    assert tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar), "bf16 arithmetic: convert to fp32 first"
    return own(self, left, right, function)


def _dot(self, a, b, into, precision, imprecise, own=interpreter.InterpreterBuilder.create_dot):
    return own(self, _exact(a), _exact(b), into, precision, imprecise)


def _exact(handle):
    if handle.dtype.scalar is not tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


interpreter._convert_float = _rounded
interpreter.InterpreterBuilder.binary_op = _no_arithmetic_on_bits
interpreter.InterpreterBuilder.create_dot = _dot


@pytest.fixture(scope="session", autouse=True)
def _on_the_cpu():
    """Triton's kernels serve the CPU, so that operations reach them as on a GPU."""
    before = backend_of("cpu")
    serve("cpu", Triton())
    yield
    serve("cpu", before)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that nobody wrote is full of NaN, or of 0xAB where there is none: what a kernel leaves out is seen."""
    own = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poisoned(function):
        def run(*arguments, **named):
            return _poison(function(*arguments, **named))

        return run

    for name, function in own.items():
        monkeypatch.setattr(torch, name, poisoned(function))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def _poison(tensor):
    if tensor.device.type != "cpu" or type(tensor) is not torch.Tensor:
        return tensor
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 0xAB if tensor.dtype is torch.uint8 else 0)
