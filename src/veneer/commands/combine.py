"""Adapters of runs and folders, combined into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.commands.config import WeightedOptions
from veneer.runs.folder import RunFolder
from veneer.runs.opened import refuse_own_weights
from veneer.updates.combine import combine


def combine_to(sources: Sequence[Path], out: Path, **options: Any) -> None:
    """Write the adapters of finished runs or adapter folders to ``out`` as one.

    ``options``: those of `WeightedOptions`. Raises what `combine` raises, and ModelError for a run that trained the
    model's own weights.

    Example:
        >>> combine_to([Path("runs/first"), Path("adapter")], Path("mixed"), weights=[1.0, -0.5])
    """
    asked = WeightedOptions(**options)
    folders = []
    for source in sources:
        refuse_own_weights(source, "combine")
        run = RunFolder(source)
        folders.append(run.adapter if run.exists else source)
    weights = asked.weights or [1 / len(folders)] * len(folders)
    combine(folders, weights, out, **{name: value for name, value in options.items() if name != "weights"})
