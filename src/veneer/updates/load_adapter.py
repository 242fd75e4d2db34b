"""A PEFT folder onto a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.arguments import folder_given, refuse_no_model, refuse_no_name
from veneer.errors import AdapterFileError, TargetError
from veneer.updates.adapter_file import (
    PREFIX,
    WEIGHTS_NAME,
    adapter_tensors,
    copy_tensors,
    mismatches,
    read_tensors,
    refuse_not_finite,
)
from veneer.updates.attach import add_adapter
from veneer.updates.beside import with_new_parts
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.declared import Declared
from veneer.updates.expected import expected_tensors
from veneer.updates.file_names import Placed, other_vocabulary, placed_on
from veneer.updates.inner import inner_model
from veneer.updates.layers import NewRows
from veneer.updates.peft_config import from_peft, kept_triplets, read_fields
from veneer.updates.reached import warn
from veneer.updates.record import adapters_of, updates_of
from veneer.updates.ties import row_groups
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
    tensors = _readable(read_tensors(folder))
    refuse_not_finite(tensors, str(folder / WEIGHTS_NAME))
    kept = kept_triplets(folder) if isinstance(config, AdaLoRA) else {}
    try:
        here = placed_on(model, config, tensors)
        wider, note = with_new_parts(model, here.config) if trainable else (here.config, None)
        rows_on = here.rows_on if wider.new_tokens == here.config.new_tokens else None
        added = _added(here, wider)
        _refuse_misfit(model, folder, here, tensors, expected_tensors(model, wider, rows_on, kept), added)
        # The random state is the caller's: initial values that the file overwrites must not consume it.
        with torch.random.fork_rng(devices=[]):
            add_adapter(model, wider, name, rows_on)
    except TargetError as error:
        if name in adapters_of(model).configs:
            raise
        raise AdapterFileError(f"{folder} does not fit this model: {error}") from None
    if kept:
        _cut_as_in(model, name, kept)
    own = adapter_tensors(model, name)
    copy_tensors(here.tensors, {key: tensor for key, tensor in own.items() if key in here.tensors})
    for update in updates_of(model, name).values():
        update.requires_grad_(trainable)
    for sentence in (note, _parted(model, name, folder) if trainable else None):
        if sentence:
            warn(sentence)
    if trainable and isinstance(config, AdaLoRA):
        _say_schedule_starts_again(model, name, folder)


def _refuse_misfit(
    model: nn.Module, folder: Path, here: Placed, tensors: dict[str, Tensor], expected: dict[str, Declared],
    added: tuple[str, ...],
) -> None:  # fmt: skip
    """Raises AdapterFileError where the file's tensors are not those that its config has on this model."""
    wanted = {key: tensor for key, tensor in expected.items() if not key.startswith(added) or key in here.tensors}
    problems = mismatches(here.tensors, wanted, set())
    if problems:
        problems = [clause for clause in (other_vocabulary(model, tensors), *problems) if clause]
        raise AdapterFileError(f"{folder} was made for another base or is incomplete: {'; '.join(problems)}.")


def _say_schedule_starts_again(model: nn.Module, name: str, folder: Path) -> None:
    """Warn where the adapter of a folder was trained and its ranks are not fixed: λ is zero before the first step."""
    allocator = adapters_of(model).allocators[name]
    if not allocator.fixed and allocator.step == 0 and any(bool(u.lam.any()) for u in allocator.triplets.values()):
        warn(
            f"{folder} was saved before its ranks were fixed, and an adapter's folder has no state of AdaLoRA: "
            f"training begins its schedule again, at step 0 of {allocator.config.total_steps}. To go on where it was, "
            f"save veneer.allocator(model).state_dict() beside the adapter and load it after load_adapter."
        )


def _parted(model: nn.Module, name: str, folder: Path) -> str | None:
    """A sentence about updates that PEFT would keep equal as it trains them, or None."""
    if not read_fields(folder).get("ensure_weight_tying"):
        return None
    updates = updates_of(model, name)
    tied = [path for path in next(iter(row_groups(model)), {}) if not isinstance(updates.get(path), NewRows | None)]
    if len(tied) < 2:
        return None
    return f"{' and '.join(tied)} are tied in the file (ensure_weight_tying), and are trained apart from here."


def _readable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those in 8 bits as fp32: torch computes nothing with them."""
    return {
        key: tensor.float() if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1 else tensor
        for key, tensor in tensors.items()
    }


def _added(here: Placed, wider: LoRA | AdaLoRA) -> tuple[str, ...]:
    """How the keys begin of what is trained further and is not in the file, since no checkpoint has it."""
    return tuple(f"{PREFIX}{part}." for part in wider.train_also if part not in here.config.train_also)


def _cut_as_in(model: nn.Module, name: str, flags: dict[str, list[bool]]) -> None:
    """Make the triplets of a new adapter those that the folder has; once some are left out, the ranks are fixed."""
    allocator = adapters_of(model).allocators[name]
    kept = allocator.kept.clone()
    for row, path in zip(kept, allocator.triplets, strict=True):
        given = flags.get(plain_name(path))
        if given is not None and len(given) == len(row):  # any other is of a module that is not here
            row.copy_(torch.tensor(given))
    allocator.fix(kept)
