"""What to change about a run that does not fit: the nearest changes that do, each with what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from veneer.errors import VeneerError
from veneer.frozen.config import CODE_BITS
from veneer.planning.plan import Plan
from veneer.training.config import TrainConfig

_EXACTNESS = {"int8": "the base's weights keep 8 bits", "nf4": "the base's weights keep 4 bits"}


@dataclass(frozen=True)
class Change:
    """Options that make a run fit, the plan with them, and their cost in words."""

    options: dict[str, Any]
    plan: Plan
    cost: str

    @property
    def said(self) -> str:
        return ", ".join(f"{name}: {str(value).lower()}" for name, value in self.options.items())

    def as_json(self) -> dict[str, Any]:
        return {"options": self.options, "peak": self.plan.peak, "needed": self.plan.needed, "cost": self.cost}


Predict = Callable[[TrainConfig], Plan]


def changes(config: TrainConfig, limit: int, now: Plan, predict: Predict, most: int = 4) -> list[Change]:
    """At most ``most`` single changes that fit ``limit`` bytes, those without a loss of exactness first; where none
    does alone, the first combination that does. Empty where nothing helps."""
    fitting = []
    singles = list(_singles(config))
    for options in singles:
        made = _with(config, options, predict)
        if made is not None and made.needed <= limit:
            fitting.append(Change(options, made, _cost(options, now, made)))
        if len(fitting) == most:
            break
    if fitting:
        return fitting
    together: dict[str, Any] = {}
    for options in singles:
        together |= options
        if len(together) < 2:
            continue
        made = _with(config, together, predict)
        if made is not None and made.needed <= limit:
            return [Change(together, made, _cost(together, now, made))]
    return []


def _singles(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Each alone, from what costs nothing but time to what costs exactness."""
    size = config.micro_batch_size or config.batch_size
    while size > 1:
        size = (size + 1) // 2
        yield {"micro_batch_size": size}
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if config.optimizer == "adamw":
        yield {"optimizer": "paged-adamw"}
    for storage in ("int8", "nf4"):
        if not config.trains_own_weights and config.storage not in CODE_BITS:
            yield {"storage": storage}
    if config.method == "full":
        yield {"method": "lora"}
        yield {"method": "lora", "storage": "nf4"}


def _with(config: TrainConfig, options: dict[str, Any], predict: Predict) -> Plan | None:
    try:
        return predict(type(config)(**{**config.changed(), "model": config.model, "data": config.data,
                                       "output": config.output, **options}))  # fmt: skip
    except VeneerError:  # options that do not go together, or a base that has no name
        return None


def _cost(options: dict[str, Any], now: Plan, made: Plan) -> str:
    costs = []
    if now.step_seconds and made.step_seconds:
        more = made.step_seconds / now.step_seconds - 1
        costs.append("as fast" if abs(more) < 0.02 else f"{abs(more):.0%} {'slower' if more > 0 else 'faster'}")
    if "storage" in options:
        costs.append(_EXACTNESS[options["storage"]])
    if options.get("optimizer") == "paged-adamw":
        costs.append("the states go through the disk")
    if options.get("method") == "lora":
        costs.append("an update of low rank is trained instead of all weights")
    if not ({"storage", "method"} & set(options)):
        costs.append("the same result")
    return "; ".join(costs)
