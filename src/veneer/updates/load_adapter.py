"""A PEFT folder onto a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.arguments import folder_given, refuse_no_model, refuse_no_name
from veneer.errors import AdapterFileError, TargetError
from veneer.updates.adapter_file import (
    PREFIX,
    ROWS,
    WEIGHTS_NAME,
    adapter_tensors,
    copy_tensors,
    mismatches,
    read_tensors,
    refuse_not_finite,
)
from veneer.updates.attach import add_adapter, remove
from veneer.updates.config import AdaLoRA
from veneer.updates.inner import inner_model
from veneer.updates.peft_config import from_peft, kept_triplets
from veneer.updates.reached import warn
from veneer.updates.record import activate, adapters_of, updates_of
from veneer.updates.select import modules_of, without_idle_names
from veneer.updates.wrappers import plain_name, refuse_occupied


def load_adapter(model: nn.Module, folder: str | Path, *, name: str = "default", trainable: bool = False) -> None:
    """Attach the adapter of a PEFT folder and make it the active one; ``trainable=True`` to train it further.

    Raises AdapterFileError, with the model unchanged, when the folder is damaged or made for another base: a tensor
    that is missing, one that has no place in this model, or one of the wrong shape.

    Example:
        >>> veneer.load_adapter(model, "adapter", trainable=True)
        >>> veneer.trainable(model).parameters > 0
        True
    """
    refuse_no_model("load_adapter", model)
    inner = inner_model(model)
    refuse_occupied(inner, model)
    model = inner
    folder = folder_given("load_adapter", folder)
    refuse_no_name("load_adapter", name)
    config = from_peft(folder)
    tensors = read_tensors(folder)
    refuse_not_finite(tensors, str(folder / WEIGHTS_NAME))
    active = adapters_of(model).active
    try:
        # The random state is the caller's: initial values that the file overwrites must not consume it.
        with torch.random.fork_rng(devices=[]):
            add_adapter(model, without_idle_names(model, config), name, _rows_on(tensors))
    except TargetError as error:
        if name in adapters_of(model).configs:
            raise
        raise AdapterFileError(f"{folder} does not fit this model: {error}") from None
    if isinstance(config, AdaLoRA):
        _cut_as_in(model, name, folder)
    own = adapter_tensors(model, name)
    problems = mismatches(tensors, own, _known_base_copies(model, tensors))
    if problems:
        remove(model, name)
        if adapters_of(model).configs:
            activate(model, *active)
        raise AdapterFileError(f"{folder} was made for another base or is incomplete: {'; '.join(problems)}.")
    copy_tensors(tensors, own)
    for update in updates_of(model, name).values():
        update.requires_grad_(trainable)
    if trainable and isinstance(config, AdaLoRA):
        _say_schedule_starts_again(model, name, folder)


def _say_schedule_starts_again(model: nn.Module, name: str, folder: Path) -> None:
    """Warn where the adapter of a folder was trained and its ranks are not fixed: λ is zero before the first step."""
    allocator = adapters_of(model).allocators[name]
    if not allocator.fixed and allocator.step == 0 and any(bool(u.lam.any()) for u in allocator.triplets.values()):
        warn(
            f"{folder} was saved before its ranks were fixed, and an adapter's folder has no state of AdaLoRA: "
            f"training begins its schedule again, at step 0 of {allocator.config.total_steps}. To go on where it was, "
            f"save veneer.allocator(model).state_dict() beside the adapter and load it after load_adapter."
        )


def _rows_on(tensors: dict[str, Tensor]) -> list[str] | None:
    """The modules that a file has new rows of, of tied ones one; None where it has none."""
    return [key.removeprefix(PREFIX).removesuffix(ROWS) for key in tensors if key.endswith(ROWS)] or None


def _cut_as_in(model: nn.Module, name: str, folder: Path) -> None:
    """Make the triplets of a new adapter those that the folder has; once some are left out, the ranks are fixed."""
    flags, allocator = kept_triplets(folder), adapters_of(model).allocators[name]
    kept = allocator.kept.clone()
    for row, path in zip(kept, allocator.triplets, strict=True):
        given = flags.get(plain_name(path))
        if given is not None and len(given) == len(row):  # any other is found when the shapes are compared
            row.copy_(torch.tensor(given))
    if flags:
        allocator.fix(kept)


def _known_base_copies(model: nn.Module, tensors: dict[str, Tensor]) -> set[str]:
    """Keys of base weights that PEFT writes beside an adapted embedding, and that equal this model's own."""
    modules, known = modules_of(model), set()
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
        weight = getattr(modules.get(path), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != tensor.shape:
            continue
        if key.endswith(".weight") and ".lora_" not in key and torch.equal(weight.to(tensor), tensor):
            known.add(key)
    return known
