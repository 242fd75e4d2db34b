"""A plan, asked for and printed: its terms, whether they fit, and what would."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from veneer.arguments import described
from veneer.data.labels import longest_row
from veneer.device import AUTO, CPU, gpus, is_host, usable_memory
from veneer.errors import ArgumentError
from veneer.notebook import html_table
from veneer.options import shows
from veneer.planning.changes import Change
from veneer.planning.config import PlanOptions
from veneer.planning.empty import Base
from veneer.planning.fit import predicted, what_would_fit
from veneer.planning.machine import Machine, measured, remembered
from veneer.planning.plan import NO_MACHINE, Plan, base_asked, limit_of
from veneer.runs.memory import Process
from veneer.runs.plan_rows import PlanRows, rows_of_plan
from veneer.runs.prepare import take_given
from veneer.runs.rows import Given, width_of
from veneer.runs.start import planned_update
from veneer.runs.start_options import with_start_options
from veneer.terminal import terminal
from veneer.training.automatic import Size, automatic, awaited, sentence
from veneer.units import amount, compared, duration

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from veneer.runs.arguments import PlanArguments


@dataclass(frozen=True, repr=False)
class Answer:
    """A plan, the memory in bytes that it is compared with, the changes that would fit where it does not, and the rows
    that it was made for; without these each row is assumed to have ``assumed`` tokens. ``automatic``: what auto chose,
    or will look at, as a sentence; ``pairs``: whether a row is two answers."""

    plan: Plan
    limit: int
    changes: list[Change]
    rows: PlanRows | None = None
    assumed: int = 0
    automatic: str = ""
    pairs: bool = False

    @property
    def fits(self) -> bool:
        return self.plan.needed <= self.limit

    @property
    def run_seconds(self) -> float | None:
        """Seconds of all steps, each by its own tokens; None where the number of steps or the rates are not known."""
        step, steps = self.plan.step_seconds, self.plan.steps if self.rows is None else self.rows.work.steps
        return None if step is None or steps is None else step * steps + (self.reference_seconds or 0.0)

    @property
    def reference_seconds(self) -> float | None:
        """Seconds of them in which the reference of preferences is computed; without rows as if each were seen once."""
        one, steps = self.plan.reference_seconds, self.plan.steps if self.rows is None else self.rows.work.reference
        return None if one is None or steps is None else one * steps

    def as_json(self) -> dict[str, Any]:
        return {
            **self.plan.as_json(),
            "limit": self.limit,
            "fits": self.fits,
            "changes": [change.as_json() for change in self.changes],
            "rows": None if self.rows is None else self.rows.as_json(),
            "chosen": None if self.rows is None else self.rows.steps.chosen,
            "run_seconds": self.run_seconds,
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

    def _sizes(self) -> list[str]:
        """For a person: the limit, what must fit it, and what each change would need. Pages of the base's file need not
        fit."""
        plan = self.plan
        size = plan.peak if plan.peak <= self.limit else plan.needed
        return compared(self.limit, size, *(change.plan.needed for change in self.changes))

    def _verdict(self) -> str:
        limit, size, *_ = self._sizes()
        return f"It {'fits' if self.fits else 'does not fit'}: {size} of {limit}."

    def _about_rows(self) -> list[str]:
        """What the plan is made for."""
        if self.rows is not None:
            lines = [f"{self.rows.steps.counts()}.", self.automatic, *self.rows.notes]
        else:
            assumed = f"Each row is assumed to have {self.assumed:,} tokens; give --data ROWS for a plan with your own."
            lines = [assumed, self.automatic]
        if self.pairs:
            lines.insert(1, "A row is two answers, each after its prompt: twice the tokens.")
        return [line for line in lines if line]

    def _about_time(self) -> list[str]:
        plan, run = self.plan, self.run_seconds
        if plan.step_seconds is None:
            return []
        step = "A step" if self.rows is None else "The largest step,"
        rate = plan.tokens / plan.step_seconds
        lines = [f"{step} of {plan.tokens:,} tokens: {duration(plan.step_seconds)}, {rate:,.0f} tokens/s."]
        if plan.steps and run is not None:
            before = self.reference_seconds
            of_it = f", of it {duration(before)} before the first one, for the reference" if before else ""
            lines.append(f"The run of {plan.steps:,} steps: {duration(run)}{of_it}.")
        return lines

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
        if plan.compute != "fp32":
            lines.append(f"Activations and products are in {plan.compute}.")
        lines += self._about_time() + self._about_rows()
        if self.changes:
            sizes = zip(self.changes, self._sizes()[2:], strict=True)
            lines.append("What would fit:")
            lines += [f"  {change.said} → {size}: {change.cost}" for change, size in sizes]
        elif not self.fits:
            lines.append("No change of storage, micro batch, checkpointing or paging makes it fit.")
        return lines


@shows(PlanOptions, [name for name in PlanOptions.model_fields if name not in ("model", "output")])
def plan(model: str | os.PathLike[str] | None = None, **options: Unpack[PlanArguments]) -> Answer:
    """Whether a training run over ``model`` fits the memory, how long it takes, and what would fit if it does not.

    ``model``: a name, folder or GGUF file, of which the config is read, and for ``data`` the tokenizer; no weights. It
    may be left out where ``adapter`` names a run or an adapter's folder to start from.
    ``data``: the rows that the run will train on, as a path or name or in memory, as `veneer.train` takes them: the
    plan is the one that ``train`` makes just before its first step. Without rows each is assumed to have ``max_length``
    tokens. Other ``options``: those of `veneer.train`, and of ``device`` a GPU's plan is of memory only;
    ``memory="8GB"`` stands for this machine's. The machine's rates are measured once, in less than a minute, and
    remembered; ``measure=True`` measures them again.

    Raises ConfigError for an option that does not exist or a value it cannot have, ArgumentError for a ``model`` of
    another type, DataError for rows that cannot be used, and ModelError for a model that is not found or cannot be
    planned.

    Example:
        >>> answer = veneer.plan("tiny", data="rows.jsonl", batch_size=8, memory="8GB")
        >>> answer.fits, answer.limit
        (True, 8000000000)
        >>> 0 < answer.plan.needed <= answer.plan.peak
        True
    """
    if not isinstance(model, str | os.PathLike) and (model is not None or not options.get("adapter")):
        raise ArgumentError(f"plan takes a model's name or path (str or pathlib.Path), not {described(model)}.")
    asked, given = take_given(dict(options))
    named = {} if model is None else {"model": os.fspath(model)}
    return answer(PlanOptions(**with_start_options({**named, **asked}, PlanOptions)), given, Process.now())


def answer(options: PlanOptions, given: Given | None = None, process: Process | None = None) -> Answer:
    """The plan of ``options``, with as few layers recomputed as fit the memory that they give, and what would fit.

    ``given``: rows that came in memory. ``process``: this one, where the run will be a part of it. The machine is
    measured, which takes a while, where its rates are asked for, and when all else is in order.
    """
    if options.device == AUTO:
        for name in gpus():
            here = answer(options.model_copy(update={"device": name}), given)
            if here.fits:
                return here
    limit = limit_of(options, usable_memory(CPU))
    rows = rows_of_plan(options, given or {}) if options.data else None
    known: dict[str, Any] = {"base": base_asked(options)} if rows is None else rows.known()
    known |= planned_update(options)
    machine = _machine(options, limit, known)
    if process is not None and is_host(options.device):
        machine = replace(process, machine=machine).at()
    if rows is not None:
        machine = machine.beside(rows.steps.memory)
    made = predicted(options, machine, limit, **known)
    changes = [] if made.needed <= limit else what_would_fit(options, machine, limit, made, **known)
    assumed = longest_row(options.max_length, known["base"].config)
    objective = options.objective if rows is None else rows.steps.config.objective
    return Answer(
        made, limit, changes, rows, assumed, _by_auto(options, rows, known["base"]),
        pairs=objective not in ("auto", "likelihood"),
    )  # fmt: skip


def _by_auto(options: PlanOptions, rows: PlanRows | None, base: Base) -> str:
    """What auto chose for the run; without rows what it would, where the steps are known, or what it looks at."""
    if rows is not None:
        return sentence(options, rows.steps.chosen)
    if options.steps:  # then it looks at no row
        return sentence(options, automatic(options, Size(width_of(base.config), options.steps, 0, base.kind)))
    return awaited(options)


def _machine(options: PlanOptions, limit: int, known: dict[str, Any]) -> Machine:
    if not is_host(options.device):
        return NO_MACHINE
    if not options.measure and (machine := remembered()) is not None:
        return machine
    predicted(options, NO_MACHINE, limit, **known)  # what can be refused is refused before a minute is taken
    return measured(afresh=options.measure, say=_say)


def _say(sentence: str) -> None:
    """Where it is seen while the machine is measured, and is no part of a JSON answer."""
    terminal(stderr=True).print(sentence, highlight=False, markup=False, soft_wrap=True)
