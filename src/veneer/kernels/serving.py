"""Which kernels serve which type of device on this machine; any other type is served by the definitions."""

from __future__ import annotations

from importlib.util import find_spec

from veneer.device import CPU, CUDA
from veneer.kernels.backends import Backend, backend_of, serve
from veneer.kernels.backends.cpu import Cpu
from veneer.kernels.backends.reference import Reference
from veneer.kernels.backends.tiles import Tiles
from veneer.kernels.backends.triton import Triton
from veneer.kernels.extension import CHOSEN, MISSING, REFERENCE, VARIABLE, has_tiles


def serving(device_type: str = CPU) -> str:
    """The name of the kernels that serve a type of device."""
    return backend_of(device_type).name


def cpu_kernels() -> Cpu | None:
    """The C++ kernels that serve on this machine's CPU, if they do."""
    kernels = backend_of(CPU)
    return kernels if isinstance(kernels, Cpu) else None


def serving_line() -> str:
    """What serves on this machine's CPU, and why if it is not the C++, in a few words."""
    if cpu_kernels() is not None:
        return f"C++, {serving()}"
    return f"plain PyTorch ({MISSING or f'{VARIABLE}={serving()}'})"


def _on_cpu() -> Backend:
    return Reference() if CHOSEN == REFERENCE else on_cpu(CHOSEN)


def on_cpu(variant: str) -> Cpu:
    """The operations by a variant of the C++ kernels, one of VARIANTS."""
    return (Tiles if has_tiles(variant) else Cpu)(variant)


serve(CPU, _on_cpu())
if CHOSEN != REFERENCE and find_spec("triton") is not None:
    serve(CUDA, Triton())
