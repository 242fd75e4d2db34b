"""The page of several runs side by side, and their table in the terminal."""

from __future__ import annotations

from rich.table import Table

from veneer.reporting.compared import RunsCompared
from veneer.reporting.page import render

_IN_THE_TERMINAL = ("state", "held-out loss", "held-out accuracy", "time in steps", "peak memory")


def compared_page(compared: RunsCompared) -> str:
    """The HTML of the runs."""
    differing, notes = compared.differing, compared.notes()
    return render(
        "compared.html", compared.charts(), labels=compared.labels, notes=notes, lowest=compared.lowest(),
        folders=[(label, str(run.folder)) for label, run in zip(compared.labels, compared.runs, strict=True)],
        differing=differing, same=compared.same, machines=compared.machines, scores=compared.scores(),
        advice=[
            (label, sentence)
            for label, run in zip(compared.labels, compared.runs, strict=True)
            for sentence in run.advice
        ],
    )  # fmt: skip


def compared_table(compared: RunsCompared) -> Table:
    """A row for each run, for the terminal: the numbers that come first."""
    rows = {row[0]: row[1:] for row in compared.scores()}
    columns = [name for name in _IN_THE_TERMINAL if name in rows]
    table = Table()
    for name in ("run", *columns):
        table.add_column(name, overflow="fold")
    for place, label in enumerate(compared.labels):
        table.add_row(label, *(rows[name][place] for name in columns))
    return table
