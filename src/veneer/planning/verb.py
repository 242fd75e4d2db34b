"""What veneer plan prints: the terms, whether they fit, and what would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from veneer.errors import ModelError, VeneerError
from veneer.planning.changes import Change, changes
from veneer.planning.config import PlanOptions
from veneer.planning.empty import Base
from veneer.planning.machine import Machine, measured, remembered, usable_memory
from veneer.planning.plan import NO_MACHINE, Plan, base_asked, limit_of, plan
from veneer.training.config import TrainConfig


@dataclass(frozen=True)
class Answer:
    """A plan, the memory that it is held against, and the changes where it does not fit."""

    plan: Plan
    limit: int
    changes: list[Change]

    @property
    def fits(self) -> bool:
        return self.plan.needed <= self.limit

    def as_json(self) -> dict[str, Any]:
        told = self.plan.as_json()
        return {
            **told,
            "limit": self.limit,
            "fits": self.fits,
            "changes": [change.as_json() for change in self.changes],
        }

    def show(self, console: Console) -> None:
        console.print(self._table())
        for line in self._lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title=f"{self.plan.model}: memory of a run", title_justify="left")
        table.add_column("")
        table.add_column("", justify="right")
        for name, size in self.plan.terms.items():
            table.add_row(name, amount(size))
        table.add_section()
        table.add_row("peak of training", amount(self.plan.training))
        table.add_row("peak of loading", amount(self.plan.loading))
        return table

    def _lines(self) -> list[str]:
        plan = self.plan
        said, size = ("fits", plan.peak) if self.fits else ("does not fit", plan.needed)
        lines = [f"It {said}: {amount(size)} of {amount(self.limit)}."]
        if self.fits and plan.peak > self.limit:
            pages = amount(plan.peak - plan.needed)
            lines.append(f"{pages} of it are the base's file, of which the system reads parts again.")
        if plan.recomputed:
            lines.append(f"Of {plan.recomputed} of {plan.layers} layers the activations are computed again.")
        if plan.step_seconds is not None:
            rate = plan.tokens / plan.step_seconds
            lines.append(f"A step of {plan.tokens:,} tokens: {duration(plan.step_seconds)}, {rate:,.0f} tokens/s.")
            if plan.steps:
                lines.append(f"The run of {plan.steps:,} steps: {duration(plan.steps * plan.step_seconds)}.")
        lines += [f"  {change.said} → {amount(change.plan.needed)}: {change.cost}" for change in self.changes]
        if not self.fits and not self.changes:
            lines.append("No change of storage, micro batch, checkpointing or paging makes it fit.")
        elif self.changes:
            lines.insert(-len(self.changes), "What would fit:")
        return lines


def answer(options: PlanOptions) -> Answer:
    """The plan of ``options``, with as few layers recomputed as fit the memory that they give, and what would fit.

    The machine is measured, which takes a while, where its rates are asked for, and when all else is in order.
    """
    limit = limit_of(options, usable_memory())
    base = base_asked(options)
    machine = NO_MACHINE if options.device == "cuda" else remembered()
    if machine is None:
        foreseen(options, NO_MACHINE, limit, base=base)
        machine = measured()
    made = foreseen(options, machine, limit, base=base)
    found = [] if made.needed <= limit else what_would_fit(options, machine, limit, made, base=base)
    return Answer(made, limit, found)


def what_would_fit(
    config: TrainConfig, machine: Machine, limit: int, now: Plan, *, base: Base, **known: Any
) -> list[Change]:
    """The changes that make a run over ``base`` fit; nobody is asked for the base again."""

    def foresee(other: TrainConfig) -> Plan:
        kept = base if other.storage == config.storage else base.kept_as(other.storage)
        return foreseen(other, machine, limit, base=kept, **known)

    return changes(config, limit, now, foresee)


def foreseen(config: TrainConfig, machine: Machine, limit: int, **known: Any) -> Plan:
    """The plan of a run; where its ``memory`` was given, with as few layers recomputed as fit ``limit``.

    Raises ModelError for a model that does what tensors without values cannot.
    """
    try:
        return _foreseen(config, machine, limit, known)
    except VeneerError:
        raise
    except Exception as error:
        raise ModelError(f"{config.model} cannot be planned: {short(error)}") from error


def _foreseen(config: TrainConfig, machine: Machine, limit: int, known: dict[str, Any]) -> Plan:
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
    found: Plan | None = None
    while low <= high:
        middle = (low + high) // 2
        made = plan(config, machine, recomputed=middle, **known)
        least = min(least, made, key=lambda one: one.needed)
        if made.needed <= limit:
            found, high = made, middle - 1
        else:
            low = middle + 1
    return found or least


def short(error: Exception) -> str:
    """What an error of others says, for a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def amount(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
