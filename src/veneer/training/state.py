"""Where a run is, and which of its checkpoints are complete. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class State:
    """Where a run is."""

    step: int = 0  # optimizer steps done
    best_loss: float | None = None  # lowest held-out loss so far
    best_step: int = 0
    worse: int = 0  # evaluations since then
    tokens: int = 0  # trained on so far, without padding
    seconds: float = 0.0  # spent in steps
    data: str = ""  # digest of the rows, to notice that they changed


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder of them, the latest last."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))
