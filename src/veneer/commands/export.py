"""A run's or a folder's adapter written as a plain LoRA."""

from __future__ import annotations

from pathlib import Path

from veneer.commands.config import ExportOptions
from veneer.runs.folder import RunFolder
from veneer.runs.opened import refuse_own_weights
from veneer.updates.export import export


def export_to(source: Path, out: Path, options: ExportOptions) -> None:
    """Write a finished run's or an adapter folder's adapter as a plain LoRA."""
    refuse_own_weights(source, "export")
    run = RunFolder(source)
    export(run.adapter if run.exists else source, out, padded=options.padded)
