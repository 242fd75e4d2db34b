"""Modules of others around a model or inside it: torch.compile's, those of several devices, peft's, and other adapters.

Adapters belong to the model inside a wrapper; a name in a file is the model's own, without those of wrappers.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from veneer.errors import TargetError
from veneer.updates.inner import inside
from veneer.updates.record import RECORD, adapted

_INSIDE = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def plain_name(text: str) -> str:
    """A module's name, or a text with such, without the parts that are wrappers inside the model."""
    return _INSIDE.sub("", text)


def refuse_occupied(model: nn.Module, given: nn.Module) -> None:
    """Raises TargetError where no adapter can be attached to ``model``, the one inside ``given``: under wrappers that
    have their list of parameters already, beside adapters of peft, or where its parts or its whole has some."""
    for wrapper in _around(given):
        if isinstance(wrapper, DistributedDataParallel):
            raise TargetError(
                "A DistributedDataParallel sums the gradients of the parameters that it was made with, and an "
                "adapter's would not be among them; attach to the model first, then wrap it."
            )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TargetError(
            "The model's weights are in the flat shards of FullyShardedDataParallel; attach to the model first, then "
            "wrap it."
        )
    _refuse_peft(model)
    for path, part in model.named_modules():
        if path and RECORD in part.__dict__:
            names = ", ".join(part.__dict__[RECORD].configs)
            raise TargetError(
                f"{path}, a part of this model, has adapters of its own ({names}), which would be covered; remove them "
                f"there first, or attach this one to that part, too."
            )
    if RECORD not in model.__dict__ and adapted(model):
        raise TargetError(
            "This module is a part of a model that has adapters already; attach to that whole model, with targets that "
            "name modules of this part."
        )


def _around(model: nn.Module) -> list[nn.Module]:
    wrappers = []
    while (inner := inside(model)) is not None:
        wrappers.append(model)
        model = inner
    return wrappers


def _refuse_peft(model: nn.Module) -> None:
    layers = [path for path, module in model.named_modules() if _is_peft(module, "BaseTunerLayer")]
    if not layers and not _is_peft(model, "PeftModel"):
        return
    where = (
        f" (on {', '.join(layers[:2])}{f' and {len(layers) - 2} more' if len(layers) > 2 else ''})" if layers else ""
    )
    raise TargetError(
        f"The model has adapters of peft already{where}, under which no other can be attached; take the base back with "
        f"model = model.unload(), or merge them with merge_and_unload(); a folder of peft's loads with "
        f"veneer.load_adapter(base, folder)."
    )


def _is_peft(module: nn.Module, kind: str) -> bool:
    """Whether a module is of a class of peft, which need not be installed."""
    return any(base.__name__ == kind and base.__module__.startswith("peft.") for base in type(module).__mro__)
