"""A run within a memory limit: its plan with as few layers recomputed as fit, and the changes that would fit."""

from __future__ import annotations

from typing import Any

from veneer.data.labels import Tokens
from veneer.errors import ModelError
from veneer.frozen.compute import computing
from veneer.planning.changes import Change, changes
from veneer.planning.empty import Base
from veneer.planning.machine import Machine
from veneer.planning.plan import Plan, base_asked, plan
from veneer.planning.step import how_of
from veneer.training.config import TrainConfig
from veneer.training.loss import How

# What a model raises that does what tensors without values cannot: torch's fake tensors a RuntimeError each (an
# operator without a fake, a value or a shape that depends on data), transformers a ValueError or ImportError for a kind
# of attention or a library that is not available. Any other is a fault of ours, and is raised as it is.
_NO_VALUES = (RuntimeError, ValueError, ImportError)


def what_would_fit(
    config: TrainConfig, machine: Machine, limit: int, now: Plan, *, base: Base, **known: Any
) -> list[Change]:
    """The changes that make a run over ``base`` fit; its config is not read again."""

    def predict(other: TrainConfig) -> Plan:
        kept = base
        if other.storage != config.storage:
            kept = base.kept_as(other.storage, other.dense_storage)
            kept = kept._replace(compute=computing(other.compute, other.storage).dtype)
        return predicted(other, machine, limit, base=kept, **known)

    return changes(config, limit, now, predict)


def predicted(config: TrainConfig, machine: Machine, limit: int, **known: Any) -> Plan:
    """The plan of a run; where its ``memory`` was given, with as few layers recomputed as fit ``limit``.

    Raises ModelError for a model that does what tensors without values cannot.
    """
    try:
        return _predicted(config, machine, limit, known)
    except _NO_VALUES as error:
        raise ModelError(f"{config.model} cannot be planned: {short(error)}") from error


def how_by_shapes(base: Base, sample: Tokens) -> How:
    """How a run over ``base`` computes its loss. Raises ModelError for a model that does what tensors without values
    cannot."""
    try:
        return how_of(base, sample)
    except _NO_VALUES as error:
        raise ModelError(f"{base.name} cannot be planned: {short(error)}") from error


def _predicted(config: TrainConfig, machine: Machine, limit: int, known: dict[str, Any]) -> Plan:
    if known.get("base") is None:
        known["base"] = base_asked(config)
    made = plan(config, machine, **known)
    if config.memory is None or config.gradient_checkpointing or made.needed <= limit or not made.layers:
        return made
    return _fewest(config, machine, limit, made, known)


def _fewest(config: TrainConfig, machine: Machine, limit: int, none: Plan, known: dict[str, Any]) -> Plan:
    """With the fewest layers recomputed that fit; the one with the least memory where no number does."""
    least = none
    low, high = 1, none.layers
    fitting: Plan | None = None
    while low <= high:
        middle = (low + high) // 2
        made = plan(config, machine, recomputed=middle, **known)
        least = min(least, made, key=lambda one: one.needed)
        if made.needed <= limit:
            fitting, high = made, middle - 1
        else:
            low = middle + 1
    return fitting or least


def short(error: Exception) -> str:
    """What an error of others says, for a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__
