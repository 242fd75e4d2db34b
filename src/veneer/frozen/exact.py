"""Parameters that are held rounded, in the type that a model computes in: their own values are kept beside them.

These are norms, biases and whatever else is no matrix of a linear layer. Their own values are what is written of the
model, and what is trained of it.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from veneer.frozen.weight import STORED

_KEPT = "_veneer_exact"
_T = TypeVar("_T")


def hold_in(module: nn.Module, name: str, exact: Tensor, dtype: torch.dtype) -> None:
    """Hold a parameter of ``module`` in ``dtype``; where that rounds, its values, ``exact``, are kept beside it."""
    parameter = cast(nn.Parameter, module._parameters[name])
    if parameter.dtype is not dtype:
        parameter.data = exact.to(dtype)
    if torch.promote_types(exact.dtype, dtype) is dtype:
        return
    if _KEPT not in module.__dict__:
        module.__dict__[_KEPT] = {}
        module.register_state_dict_post_hook(_as_they_were)  # type: ignore[no-untyped-call]
    module.__dict__[_KEPT][name] = exact.detach()


def exact_value(module: nn.Module, name: str) -> Tensor:
    """A parameter's own values; itself where it is not rounded, or was given other values since."""
    parameter = cast(nn.Parameter, module._parameters[name])
    kept: Tensor | None = module.__dict__.get(_KEPT, {}).get(name)
    if kept is None or kept.shape != parameter.shape:
        return parameter
    there = kept.to(parameter.device)
    if isinstance(kept, FakeTensor):  # of a plan, which has no values
        return there
    return there if torch.equal(there.to(parameter.dtype), parameter.detach()) else parameter


def kept_values(model: nn.Module) -> list[Tensor]:
    """The own values of all that is held rounded in ``model``."""
    return [value for module in model.modules() for value in module.__dict__.get(_KEPT, {}).values()]


def whole_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` to be trained whole: of its own values. If they are held rounded in ``module``, the copy
    computes in their type, and hands on the type that it was given."""
    made = copy.deepcopy(module)
    restored = False
    for own, part in zip(module.modules(), made.modules(), strict=True):
        for name in part.__dict__.pop(_KEPT, {}):
            cast(nn.Parameter, part._parameters[name]).data = exact_value(own, name).detach().clone()
            restored = True
    if restored and type(made) not in STORED.values():  # which multiply in the type of their input
        dtype = next(parameter.dtype for parameter in made.parameters() if parameter.is_floating_point())
        computes_in(made, dtype)
    return made


def computes_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Give ``module`` what it is called with in ``dtype``, and its caller the type that it gave."""
    given: list[torch.dtype] = []
    module.register_forward_pre_hook(partial(_into, dtype, given), with_kwargs=True)
    module.register_forward_hook(partial(_back, given))


def _into(dtype: torch.dtype, given: list[torch.dtype], module: nn.Module, args: Any, kwargs: Any) -> Any:
    first = next((x for x in (*args, *kwargs.values()) if _floats(x)), None)
    given[:] = [dtype if first is None else first.dtype]
    return _in(dtype, args), _in(dtype, kwargs)


def _back(given: list[torch.dtype], module: nn.Module, args: Any, output: Any) -> Any:
    return _in(given[0], output)


def _in(dtype: torch.dtype, tree: _T) -> _T:
    made: _T = tree_map(lambda x: x.to(dtype) if _floats(x) else x, tree)
    return made


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _as_they_were(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """In a state dict, the own values of what is held rounded; ``keep_vars`` keeps the parameters themselves."""
    for name in module.__dict__.get(_KEPT, {}):
        key = f"{prefix}{name}"
        if key in state and state[key] is not module._parameters[name]:
            state[key] = exact_value(module, name).detach()
