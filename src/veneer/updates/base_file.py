"""The base that iterations of LoftQ, or PiSSA, changed, as a folder of its own, over which its adapter is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from veneer.arguments import described, folder_given, refuse_no_model
from veneer.errors import ArgumentError, TargetError
from veneer.files import atomic_folder
from veneer.frozen.experts import DenseStack, Stack, put_stack
from veneer.frozen.weight import QuantisedLinear
from veneer.models.bnb_file import write_folder
from veneer.models.composite import copy_processor, whole
from veneer.models.library import quiet
from veneer.updates.experts import AdaptedStack
from veneer.updates.inner import inner_model
from veneer.updates.layers import Adapted, training_dtype
from veneer.updates.record import adapters_of, put, refuse_merged


def save_base(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write the base under the adapters, its linear layers in nf4 or fp4, as a bitsandbytes checkpoint.

    The model is then one that was loaded from there: an adapter that is saved names that folder as its base. Raises
    TargetError when the base is not kept in nf4 or fp4 or the adapters are merged, ModelError when transformers could
    not load what would be written, OSError when the folder cannot be written to.

    Example:
        >>> model, tokenizer = veneer.load("tiny", storage="nf4")
        >>> model = veneer.attach(model, veneer.LoRA(init="loftq", loftq_iterations=3))
        >>> veneer.save_base(model, tokenizer, "base")
        >>> veneer.save(model, "adapter-of-base")
    """
    refuse_no_model("save_base", model)
    model = inner_model(model)
    if not hasattr(tokenizer, "save_pretrained"):
        raise ArgumentError(f"save_base takes the model's tokenizer as tokenizer, not {described(tokenizer)}.")
    folder = folder_given("save_base", folder)
    record = adapters_of(model)
    refuse_merged(record, "save the base")
    if not any(isinstance(module, QuantisedLinear) for module in model.modules()):
        raise TargetError("save_base writes a base that is kept in nf4 or fp4; for any other use save_pretrained.")
    wrappers = {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}
    for path, wrapper in wrappers.items():
        _put(model, path, wrapper.base)
    try:
        with atomic_folder(folder) as temporary, quiet():
            with whole(model):
                write_folder(model, temporary, training_dtype(next(model.parameters())))
            copy_processor(model, temporary)
            tokenizer.save_pretrained(temporary)
    finally:
        for path, wrapper in wrappers.items():
            _put(model, path, wrapper)
    model.config.name_or_path = model.name_or_path = str(folder.resolve())
    record.changed_base = ""


def _put(model: Any, path: str, module: nn.Module) -> None:
    """`put`, and of experts that are dense the parameter itself, which is written under its own name."""
    parent, _, name = path.rpartition(".")
    if isinstance(module, Stack | AdaptedStack):
        put_stack(model.get_submodule(parent), name, module.weight if isinstance(module, DenseStack) else module)
    else:
        put(model, path, module)
