"""What operations are compared with: the definitions of all those in some modules, by name."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

from veneer.kernels.operation import Operation


def definitions(*modules: ModuleType) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            name: value.definition
            for module in modules
            for name, value in vars(module).items()
            if isinstance(value, Operation)
        }
    )
