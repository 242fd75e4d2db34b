"""The device of a run, and of what is used: as asked, as it began, or for auto a GPU that holds it by the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.device import AUTO, CPU, available, gpus, usable_memory
from veneer.errors import ConfigError, ModelError, VeneerError
from veneer.options import memory_size
from veneer.planning.config import PlanOptions
from veneer.planning.fit import predicted
from veneer.planning.plan import NO_MACHINE, base_asked
from veneer.runs.computing import began
from veneer.runs.facts import read_facts
from veneer.runs.folder import RunFolder
from veneer.runs.plan_rows import rows_of_plan
from veneer.runs.rows import Given
from veneer.runs.start import planned_update
from veneer.training.config import TrainConfig
from veneer.units import compared
from veneer.updates.peft_config import CONFIG_NAME, base_named, read_fields

Placed = tuple[str, list[str]]  # a device's name, and what is said of it


def place_of_run(run: RunFolder, config: TrainConfig, given: Given) -> Placed:
    """Where a run trains; ``given``: rows that came in memory.

    Raises ConfigError for a device that is not here; for auto what rows or model make impossible.
    """
    if config.device != AUTO:
        return available(config.device), []
    if not began(run):
        return _first_that_holds(lambda device: _needed_by_run(config, given, device), config.memory)
    name = run.chosen().get("device", CPU)
    try:
        return available(name), []
    except ConfigError:
        return CPU, [f"The run began on {name}, which is not here: it goes on on the CPU."]


def place_for_use(source: str | Path | Any, device: str) -> str:
    """Where the model that is called ``source`` is put to be used. Raises ConfigError for a device that is not here."""
    if device != AUTO:
        return available(device)
    return _first_that_holds(lambda name: _needed_for_use(source, name))[0]


def _first_that_holds(needed: Callable[[str], int], memory: str | None = None) -> Placed:
    """The first GPU with the bytes that are ``needed`` on it, else the CPU; without a GPU nothing is planned."""
    notes = []
    for name in gpus():
        limit = usable_memory(name) if memory is None else min(usable_memory(name), memory_size(memory))
        try:
            size = needed(name)
        except ModelError as error:
            notes.append(f"{name} is left alone, since the memory cannot be predicted ({error}); give device {name}.")
            continue
        there, wanted = compared(limit, size)
        if size <= limit:
            return name, [*notes, f"On {name}: {wanted} of {there} are needed by the plan."]
        notes.append(f"{name} is left alone: {wanted} are needed by the plan, and {there} are available there.")
    return CPU, notes


def _needed_by_run(config: TrainConfig, given: Given, device: str) -> int:
    placed = config.model_copy(update={"device": device})
    known = {**rows_of_plan(placed, given).known(), **planned_update(placed)}
    limit = usable_memory(device) if config.memory is None else memory_size(config.memory)
    return predicted(placed, NO_MACHINE, limit, **known).needed


def _needed_for_use(source: str | Path | Any, device: str) -> int:
    """Bytes that a small step of training takes: more than a pass of the same tokens does."""
    least: dict[str, Any] = {"device": device, "batch_size": 1, "targets": "all-linear", "rank": 1}
    run = RunFolder(source) if isinstance(source, str | Path) else None
    try:
        if run is not None and run.exists:
            config = run.config()
            options = PlanOptions(model=run.base_source(config), **config.kept(), **least)
        elif run is not None and (Path(source) / CONFIG_NAME).is_file():
            facts = read_facts(Path(source))
            kept = {} if facts is None else {k: v for k, v in facts.kept.items() if k != "compute"}
            options = PlanOptions(model=str(base_named(read_fields(Path(source)))), **kept, **least)
        else:
            options = PlanOptions(model=str(source), **least)
        return predicted(options, NO_MACHINE, usable_memory(device), base=base_asked(options)).needed
    except VeneerError as error:
        raise ModelError(str(error)) from error
