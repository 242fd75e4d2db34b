"""Which adapters a model has, and which of them are in force."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from veneer.arguments import refuse_no_model, refuse_no_name
from veneer.errors import TargetError, did_you_mean
from veneer.updates.allocator import Allocator
from veneer.updates.config import AdaLoRA, LoRA
from veneer.updates.inner import inner_model
from veneer.updates.layers import Adapted, LowRank, Replaced
from veneer.updates.merge_checks import Written
from veneer.updates.reached import Reached
from veneer.updates.rows import Names, Off, RowAdapters

RECORD = "_veneer_adapters"


Holders = dict[int, list[tuple[nn.Module, str]]]  # by the identity of what is held


@dataclass
class Adapters:
    """What is attached to a model; kept on the model itself, so that a copy of the model has its own."""

    configs: dict[str, LoRA | AdaLoRA] = field(default_factory=dict)
    chosen: Names = ()  # by `activate`
    off: Off = field(default_factory=Off)  # the open blocks of `disabled`
    # What gives AdaLoRA adapters' ranks to the matrices while they are trained.
    allocators: dict[str, Allocator] = field(default_factory=dict)
    # Which of each adapter's updates training has reached.
    reached: dict[str, Reached] = field(default_factory=dict)
    # The base parameters that required a gradient before the first attach, to give back after the last remove.
    was_trainable: set[str] = field(default_factory=set)
    # While merged: the wrappers that the merged modules replace, by name, and whether the config said "tied".
    merged: dict[str, nn.Module] = field(default_factory=dict)
    was_tied: bool | None = None
    written: dict[str, Written] = field(default_factory=dict)  # and what the merge wrote, to see changes after it
    # The option that changed the base's codes, until the changed base is saved; else "".
    changed_base: str = ""
    # What completes the model's state dict, and takes it back.
    hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def active(self) -> Names:
        """Those in force in this thread."""
        return () if self.off.get() else self.chosen

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: blocks of `disabled` that are open are the original's, and the copy stays as it is."""
        return {**self.__dict__, "chosen": self.active}


def adapters_of(model: nn.Module) -> Adapters:
    """The model's record of adapters; an empty one when nothing is attached."""
    record = model.__dict__.get(RECORD)
    return record if isinstance(record, Adapters) else Adapters()


def activate(model: nn.Module, *names: str) -> None:
    """Put these adapters in force, together; with no name, none is.

    Raises TargetError, with the model unchanged, for a name that is not attached, and for adapters that cannot be
    summed: a module that one of them trains whole, or whose rows it replaces, takes no second update.

    Example:
        >>> for name in ("brief", "formal"):
        ...     model = veneer.attach(model, veneer.LoRA(rank=2), name)
        >>> veneer.activate(model, "brief", "formal")  # both, summed
        >>> veneer.activate(model)  # none: the base
    """
    refuse_no_model("activate", model)
    model = inner_model(model)
    record = adapters_of(model)
    refuse_merged(record, "activate an adapter")
    for name in names:
        refuse_no_name("activate", name)
        refuse_unknown(record, name)
    _refuse_unsummable(model, names)
    record.chosen = tuple(dict.fromkeys(names))
    for module in adapted(model).values():
        module.chosen, module.off = record.chosen, record.off


def allocator(model: nn.Module, name: str | None = None) -> Allocator:
    """What gives their ranks to the matrices of an AdaLoRA adapter: its budget, ranks, importance, and its state.

    ``name``: which adapter; by default the one that is active. Raises TargetError when it is no AdaLoRA adapter.

    Example:
        >>> model = veneer.attach(model, veneer.AdaLoRA(targets=["q_proj"], target_rank=2, total_steps=100))
        >>> veneer.allocator(model)
        Allocator(step 0, budget 6 triplets, ranks 3 to 3 of 2 matrices, ranks fixed at step 50)
    """
    refuse_no_model("allocator", model)
    model = inner_model(model)
    if name is not None:
        refuse_no_name("allocator", name)
    record = adapters_of(model)
    if name is None and len(record.active) == 1:
        name = record.active[0]
    if name not in record.allocators:
        have = f"; of the attached ones these are: {', '.join(record.allocators)}" if record.allocators else ""
        raise TargetError(f"{'No one adapter is active' if name is None else f'{name!r} is no AdaLoRA adapter'}{have}.")
    return record.allocators[name]


def untrained(model: nn.Module, name: str | None = None) -> list[str]:
    """Sentences about updates of an adapter, by default of the active ones, that training never reached or changed."""
    record = adapters_of(model)
    names = record.active if name is None else (name,)
    return [sentence for name in names if name in record.reached for sentence in record.reached[name].untrained()]


def active_allocator(model: nn.Module) -> Allocator | None:
    """The allocator of the one adapter that is active, or None when that is no AdaLoRA adapter."""
    record = adapters_of(model)
    return record.allocators.get(record.active[0]) if len(record.active) == 1 else None


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base, for this thread; others go on with its adapters.

    Example:
        >>> veneer.load_adapter(model, "adapter")
        >>> ids = tokenizer("hello", return_tensors="pt").input_ids
        >>> with veneer.disabled(model):
        ...     base = model(ids).logits
        >>> torch.equal(base, model(ids).logits)
        False
    """
    refuse_no_model("disabled", model)
    record = adapters_of(inner_model(model))
    refuse_merged(record, "turn its adapters off")
    with record.off.block():
        yield


@contextmanager
def row_adapters(model: nn.Module, names: list[Names], width: int) -> Iterator[None]:
    """Inside, row i of a pass through ``model`` is computed with the adapters ``names[i]`` (none: the base), whichever
    are active; each row has ``width`` tokens. The layers of this model alone know of it.

    A pass raises ModelError where a layer mixes rows that differ in their adapters, as experts do.
    """
    rows = RowAdapters(names, width)
    with ExitStack() as layers:
        for layer in adapted(model).values():
            layers.enter_context(layer.own_rows.put(rows))
        yield


def put(model: nn.Module, path: str, module: nn.Module, holders: Holders | None = None) -> None:
    """Make ``module`` stand wherever the one that ``path`` names stands: some models hold one module in two places.

    ``holders``: `holders_of` the model, listed once where many are put.
    """
    there = model.get_submodule(path)
    for parent, child in (holders_of(model) if holders is None else holders)[id(there)]:
        if parent is not module and not (isinstance(parent, Adapted) and parent.base is there):
            setattr(parent, child, module)


def holders_of(model: nn.Module) -> Holders:
    """The modules that hold each module, with its name there; named_children would leave out a second name."""
    holders: Holders = {}
    for parent in model.modules():
        for child, held in parent._modules.items():
            holders.setdefault(id(held), []).append((parent, child))
    return holders


def updates_of(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Module name → the update (or whole copy) that adapter ``name`` has there, in the model's order."""
    return {path: module.updates[name] for path, module in adapted(model).items() if name in module.updates}


def refuse_unknown(record: Adapters, name: str) -> None:
    if name not in record.configs:
        have = f"Attached are: {', '.join(record.configs)}." if record.configs else "None is attached."
        raise TargetError(f"No adapter named {name!r} is attached.{did_you_mean(name, record.configs)} {have}")


def refuse_merged(record: Adapters, action: str) -> None:
    if record.merged:
        raise TargetError(f"The model's adapters are merged into its weights; unmerge(model) before you {action}.")


def adapted(model: nn.Module) -> dict[str, Adapted]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


def _refuse_unsummable(model: nn.Module, names: tuple[str, ...]) -> None:
    for path, module in adapted(model).items():
        meeting = [name for name in dict.fromkeys(names) if name in module.updates]
        alone = [name for name in meeting if not isinstance(module.updates[name], LowRank)]
        if alone and len(meeting) > 1:
            what = "trains it whole" if isinstance(module, Replaced) else "replaces some of its rows"
            raise TargetError(
                f"The adapters {', '.join(meeting)} meet at {path}, and {alone[0]} {what}, so they cannot be in force "
                f"together; activate one of them at a time."
            )
