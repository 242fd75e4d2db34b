"""How the rows of a run were read, for other rows that its model is measured on or asked."""

from __future__ import annotations

from pathlib import Path

from veneer.data.columns import SHAPES, Reading
from veneer.runs.facts import read_facts
from veneer.runs.folder import RunFolder


def kept_reading(source: str | Path) -> Reading | None:
    """As the rows of a run, or of the run that wrote an adapter's folder, were read; None for a model, and for an
    adapter of another library."""
    run = RunFolder(source)
    if run.exists:
        rows = run.rows()
        return _reading(rows.get("shape", ""), rows.get("columns", {}))
    facts = read_facts(Path(source))
    return _reading(facts.rows.shape, facts.options.get("columns", {})) if facts is not None else None


def _reading(shape: str, columns: dict[str, str]) -> Reading:
    return Reading(columns, shape if shape in SHAPES else "auto", asked=False)
