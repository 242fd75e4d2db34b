"""The operations as torch.library operators, ``torch.ops.veneer.…``, and which implementation serves each device.

What each computes, and its arguments: reference.py. Registered with fakes, so that torch.compile and export see shapes
and nothing inside.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.kernels.backends import cpu, reference

FEW = 8  # rows of x that the products take
VARIABLE = "VENEER_KERNELS"

_SCALES = "Tensor scales, Tensor? nested_table, Tensor? nested_scales, Tensor? offset"
_WEIGHT = f"Tensor codes, Tensor table, {_SCALES}"
_SCHEMAS = {
    "quantise4": "(Tensor weight, Tensor boundaries, Tensor order, int block) -> (Tensor, Tensor)",
    "quantise8": "(Tensor weight, Tensor boundaries, int block) -> (Tensor, Tensor)",
    "nearest8": "(Tensor values, Tensor boundaries) -> Tensor",
    "dequantise4": f"({_WEIGHT}, int block, int nested_block, int first, Tensor(a!) out) -> ()",
    "product4": f"(Tensor x, {_WEIGHT}, int block, int nested_block, int rows) -> Tensor",
    "dequantise8": f"(Tensor codes, {_SCALES}, int block, int nested_block, int first, Tensor(a!) out) -> ()",
    "product8": f"(Tensor x, Tensor codes, {_SCALES}, int block, int nested_block, int rows) -> Tensor",
    "product4_int8": f"(Tensor x, Tensor codes, Tensor levels, float step, {_SCALES}, int block, int nested_block, "
    "int rows) -> Tensor",
    "product8_int8": "(Tensor x, Tensor codes, Tensor scales) -> Tensor",
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward": "(Tensor grad, Tensor x, Tensor inverse, Tensor weight) -> Tensor",
    "swiglu": "(Tensor gate, Tensor up) -> Tensor",
    "swiglu_backward": "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    "geglu": "(Tensor gate, Tensor up) -> Tensor",
    "geglu_backward": "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    "update_product": "(Tensor x, Tensor A, Tensor B, float scale, Tensor(a!) y) -> Tensor",
    "update_product_backward": "(Tensor grad, Tensor x, Tensor low, Tensor A, Tensor B, float scale, "
    "Tensor(a!)? grad_x) -> (Tensor, Tensor)",
    "rotate": "(Tensor x, Tensor cosines, Tensor sines, bool transposed) -> Tensor",
}


@cache
def _on_cpu() -> Any:
    """The fastest variant, or the one that VENEER_KERNELS names. Raises ConfigError when the machine cannot run it."""
    wanted = os.environ.get(VARIABLE)
    if wanted == reference.name or (not wanted and not cpu.VARIANTS):
        return reference
    if not wanted:
        return cpu.Cpu(cpu.VARIANTS[-1])
    if wanted not in cpu.VARIANTS:
        able = ", ".join((reference.name, *cpu.VARIANTS))
        why = f" (no C++ kernels: {cpu.MISSING})" if cpu.MISSING else ""
        raise ConfigError(f"{VARIABLE} is {wanted!r}, which this machine cannot run. It can run {able}{why}.")
    return cpu.Cpu(wanted)


# A device that is not here is served by the reference.
TABLE: dict[str, Callable[[], Any]] = {"cpu": _on_cpu}


def serving(device: str = "cpu") -> str:
    """The name of the kernels that serve a type of device."""
    name: str = TABLE.get(device, lambda: reference)().name
    return name


def cpu_kernels() -> cpu.Cpu | None:
    """The C++ kernels that serve on this machine's CPU, if they do."""
    kernels = _on_cpu()
    return kernels if isinstance(kernels, cpu.Cpu) else None


def serving_line() -> str:
    """What serves on this machine's CPU, and why if it is not the C++, in a few words."""
    name = serving()
    if name != reference.name:
        return f"C++, {name}"
    return f"plain PyTorch ({cpu.MISSING or f'{VARIABLE}={name}'})"


def prepared_int8(codes: Tensor, *weight_rows_columns: Any) -> Callable[[Tensor], Tensor]:
    """product4_int8 of one weight, without the operator's and the checks' time in each call: x (tokens, columns), fp32,
    of 1 to FEW tokens → (tokens, rows)."""
    kernels = TABLE.get(codes.device.type, lambda: reference)()
    prepared: Callable[[Tensor], Tensor] = kernels.prepared_int8(codes, *weight_rows_columns)
    return prepared


def _dispatch(operation: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        kernels = TABLE.get(arguments[0].device.type, lambda: reference)()
        return getattr(kernels, operation)(*arguments)

    return run


def _fake_quantise4(weight: Tensor, boundaries: Tensor, order: Tensor, block: int) -> tuple[Tensor, Tensor]:
    size = weight.numel()
    return weight.new_empty((size + 1) // 2, dtype=torch.uint8), weight.new_empty((size + block - 1) // block)


def _fake_quantise8(weight: Tensor, boundaries: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = (weight.numel() + block - 1) // block
    return torch.empty_like(weight, dtype=torch.uint8), weight.new_empty(blocks)


def _fake_nearest8(values: Tensor, boundaries: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=torch.uint8)


def _fake_dequantise(*arguments: Any) -> None:
    return None


def _fake_product(x: Tensor, *weight_and_rows: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight_and_rows[-1])


def _fake_product8_int8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])


def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=dtype)


def _fake_rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fake_gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


def _fake_gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _fake_update_product(x: Tensor, A: Tensor, B: Tensor, scale: float, y: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[0])


def _fake_update_product_backward(
    grad: Tensor, x: Tensor, low: Tensor, A: Tensor, B: Tensor, scale: float, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(A), torch.empty_like(B)


def _fake_rotate(x: Tensor, cosines: Tensor, sines: Tensor, transposed: bool) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"veneer::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"veneer::{_name}", "default", _dispatch(_name))
torch.library.register_fake("veneer::quantise4", _fake_quantise4)
torch.library.register_fake("veneer::quantise8", _fake_quantise8)
torch.library.register_fake("veneer::nearest8", _fake_nearest8)
torch.library.register_fake("veneer::dequantise4", _fake_dequantise)
torch.library.register_fake("veneer::product4", _fake_product)
torch.library.register_fake("veneer::dequantise8", _fake_dequantise)
torch.library.register_fake("veneer::product8", _fake_product)
torch.library.register_fake("veneer::product4_int8", _fake_product)
torch.library.register_fake("veneer::product8_int8", _fake_product8_int8)
torch.library.register_fake("veneer::rms_norm", _fake_rms_norm)
torch.library.register_fake("veneer::rms_norm_backward", _fake_rms_norm_backward)
torch.library.register_fake("veneer::swiglu", _fake_gated)
torch.library.register_fake("veneer::swiglu_backward", _fake_gated_backward)
torch.library.register_fake("veneer::geglu", _fake_gated)
torch.library.register_fake("veneer::geglu_backward", _fake_gated_backward)
torch.library.register_fake("veneer::rotate", _fake_rotate)
torch.library.register_fake("veneer::update_product", _fake_update_product)
torch.library.register_fake("veneer::update_product_backward", _fake_update_product_backward)

quantise4 = torch.ops.veneer.quantise4.default
quantise8 = torch.ops.veneer.quantise8.default
nearest8 = torch.ops.veneer.nearest8.default
dequantise4 = torch.ops.veneer.dequantise4.default
product4 = torch.ops.veneer.product4.default
dequantise8 = torch.ops.veneer.dequantise8.default
product8 = torch.ops.veneer.product8.default
product4_int8 = torch.ops.veneer.product4_int8.default
product8_int8 = torch.ops.veneer.product8_int8.default
rms_norm = torch.ops.veneer.rms_norm.default
rms_norm_backward = torch.ops.veneer.rms_norm_backward.default
swiglu = torch.ops.veneer.swiglu.default
swiglu_backward = torch.ops.veneer.swiglu_backward.default
geglu = torch.ops.veneer.geglu.default
geglu_backward = torch.ops.veneer.geglu_backward.default
rotate = torch.ops.veneer.rotate.default
update_product = torch.ops.veneer.update_product.default
update_product_backward = torch.ops.veneer.update_product_backward.default
