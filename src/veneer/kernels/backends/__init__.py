"""What a device's kernels offer, and which backend serves which type of device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from veneer.kernels.backends.reference import Reference
from veneer.kernels.coded import CodedWeight, Levels
from veneer.kernels.operation import Kernel


class Backend(Protocol):
    """The kernels of a type of device, and how to multiply there by a weight that is not stored as it is computed in.

    An operation for which it has no kernel is served by its definition, so a backend may begin with one kernel.
    """

    @property
    def name(self) -> str:
        """As `serving` reports it."""
        ...

    def kernels(self) -> Iterable[Kernel]:
        """One for each operation that it computes itself: ``rms_norm.by(function)``."""
        ...

    def few_rows(self, dtype: torch.dtype) -> int:
        """The most rows of x, of type ``dtype``, that `coded_product` multiplies faster than panels of the expanded
        weight do; 0 where it never does, or does not take the type."""
        ...

    def adapts(self, dtype: torch.dtype) -> bool:
        """Whether x of this type is multiplied by a weight and its update in one product (`product_with_update`),
        faster than by each."""
        ...

    def attends(self, dtype: torch.dtype, dim: int) -> bool:
        """Whether its kernel of `attention` takes this type and heads of so many dimensions. It is ahead of torch's
        there."""
        ...

    def panel_product(self, x: Tensor, panel: Tensor) -> Tensor:
        """x (n, in), panel (rows, in) → a new x panelᵀ (n, rows); any strides, no gradient. The panel is used once."""
        ...

    def prepared_int8(self, weight: CodedWeight, levels: Levels) -> Callable[[Tensor], Tensor]:
        """product4_int8 of one weight, checked once: x (tokens, columns), fp32, of 1 to `few_rows` tokens → (tokens,
        rows). Each call costs neither the operator's time nor that of the checks."""
        ...


_REFERENCE: Backend = Reference()
_serving: dict[str, tuple[Backend, torch.library.Library]] = {}  # by type of device


def serve(device_type: str, backend: Backend) -> None:
    """Serve this type of device by ``backend``, in the whole process; it replaces the one before."""
    _serving.pop(device_type, None)  # torch drops a library's kernels with the library
    library = torch.library.Library("veneer", "FRAGMENT")  # type: ignore[no-untyped-call]
    for kernel in backend.kernels():
        torch.library.impl(kernel.name, device_type, kernel.run, lib=library)
    _serving[device_type] = backend, library


def backend_of(device_type: str) -> Backend:
    """What serves this type of device: the reference where no other backend does."""
    return _serving[device_type][0] if device_type in _serving else _REFERENCE
