"""What veneer plan prints: the terms, whether they fit, and what would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from veneer.device import CPU, usable_memory
from veneer.planning.changes import Change
from veneer.planning.config import PlanOptions
from veneer.planning.fit import predicted, what_would_fit
from veneer.planning.machine import measured, remembered
from veneer.planning.plan import NO_MACHINE, Plan, base_asked, limit_of
from veneer.units import amount, duration


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
    limit = limit_of(options, usable_memory(CPU))
    base = base_asked(options)
    machine = NO_MACHINE if options.device != CPU else remembered()
    if machine is None:
        predicted(options, NO_MACHINE, limit, base=base)
        machine = measured()
    made = predicted(options, machine, limit, base=base)
    found = [] if made.needed <= limit else what_would_fit(options, machine, limit, made, base=base)
    return Answer(made, limit, found)
