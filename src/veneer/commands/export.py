"""A run's or a folder's adapter written as a plain LoRA."""

from __future__ import annotations

from pathlib import Path

from veneer.commands.config import ExportOptions
from veneer.runs.opened import refuse_own_weights
from veneer.runs.train import ADAPTER
from veneer.training.config import CONFIG_NAME
from veneer.updates.export import export


def export_to(source: Path, out: Path, options: ExportOptions) -> None:
    """Write a finished run's or an adapter folder's adapter as a plain LoRA."""
    refuse_own_weights(source, "export")
    export(source / ADAPTER if (source / CONFIG_NAME).is_file() else source, out, padded=options.padded)
