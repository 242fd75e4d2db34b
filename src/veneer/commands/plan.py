"""A plan, asked for and printed: its terms, whether they fit, and what would."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from veneer.arguments import described
from veneer.device import CPU, usable_memory
from veneer.errors import ArgumentError
from veneer.notebook import html_table
from veneer.options import shows
from veneer.planning.changes import Change
from veneer.planning.config import PlanOptions
from veneer.planning.fit import predicted, what_would_fit
from veneer.planning.machine import measured, remembered
from veneer.planning.plan import NO_MACHINE, Plan, base_asked, limit_of
from veneer.units import amount, duration

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from veneer.runs.arguments import PlanArguments


@dataclass(frozen=True, repr=False)
class Answer:
    """A plan, the memory in bytes that it is compared with, and the changes that would fit where it does not."""

    plan: Plan
    limit: int
    changes: list[Change]

    @property
    def fits(self) -> bool:
        return self.plan.needed <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {
            **self.plan.as_json(),
            "limit": self.limit,
            "fits": self.fits,
            "changes": [change.as_json() for change in self.changes],
        }

    def show(self, console: Console) -> None:
        console.print(self._table())
        for line in self.lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __repr__(self) -> str:
        return f"Answer({self.plan!r}. {self._verdict()})"

    def _repr_html_(self) -> str:
        return html_table(("", "memory"), self.plan.rows(), f"{self.plan.model}: {' '.join(self.lines())}")

    def _table(self) -> Table:
        table = Table(title=f"{self.plan.model}: memory of a run", title_justify="left")
        table.add_column("")
        table.add_column("", justify="right")
        rows = self.plan.rows()
        for number, row in enumerate(rows):
            table.add_row(*row, end_section=number == len(rows) - 3)  # before the two peaks
        return table

    def _verdict(self) -> str:
        """What is needed is what must fit: pages of the base's file need not."""
        plan = self.plan
        size = plan.peak if plan.peak <= self.limit else plan.needed
        return f"It {'fits' if self.fits else 'does not fit'}: {amount(size)} of {amount(self.limit)}."

    def lines(self) -> list[str]:
        """The sentences under the table."""
        plan, lines = self.plan, [self._verdict()]
        if self.fits and plan.peak > self.limit:
            pages = amount(plan.peak - plan.needed)
            lines.append(f"The other {pages} of the peak are pages of the base's file, which need not fit: the system "
                         f"reads them again.")  # fmt: skip
        if plan.recomputed:
            lines.append(
                f"Activations of {plan.recomputed} of {plan.layers} layers will be recomputed (gradient checkpointing)."
            )
        if plan.step_seconds is not None:
            rate = plan.tokens / plan.step_seconds
            lines.append(f"A step of {plan.tokens:,} tokens: {duration(plan.step_seconds)}, {rate:,.0f} tokens/s.")
            if plan.steps:
                lines.append(f"The run of {plan.steps:,} steps: {duration(plan.steps * plan.step_seconds)}.")
        if self.changes:
            lines.append("What would fit:")
            lines += [f"  {change.said} → {amount(change.plan.needed)}: {change.cost}" for change in self.changes]
        elif not self.fits:
            lines.append("No change of storage, micro batch, checkpointing or paging makes it fit.")
        return lines


@shows(PlanOptions, [name for name in PlanOptions.model_fields if name not in ("model", "data", "output")])
def plan(model: str | os.PathLike[str], **options: Unpack[PlanArguments]) -> Answer:
    """Whether a training run over ``model`` fits the memory, how long it takes, and what would fit if it does not.

    ``model``: a name, folder or GGUF file, of which the config alone is read. ``options``: those of `veneer.train`, and
    ``device`` ("cpu", or "cuda" for the memory on a GPU); ``memory="8GB"`` stands for this machine's. The machine's
    rates are measured once, in less than a minute, and remembered.

    Raises ConfigError for an option that does not exist or a value it cannot have, ArgumentError for a ``model`` of
    another type, and ModelError for one that is not found or cannot be planned.

    Example:
        >>> answer = veneer.plan("tiny", batch_size=8, max_length=64, memory="2GB")
        >>> answer.fits, answer.limit
        (True, 2000000000)
        >>> 0 < answer.plan.needed <= answer.plan.peak
        True
    """
    if not isinstance(model, str | os.PathLike):
        raise ArgumentError(f"plan takes a model's name or path (str or pathlib.Path), not {described(model)}.")
    return answer(PlanOptions(model=os.fspath(model), **options))


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
    changes = [] if made.needed <= limit else what_would_fit(options, machine, limit, made, base=base)
    return Answer(made, limit, changes)
