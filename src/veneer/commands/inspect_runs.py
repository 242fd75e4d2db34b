"""The runs in a folder, the newest first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.models.origin import bare_name
from veneer.runs.folder import RunFolder
from veneer.runs.history import RunHistory

_HEAD = ("run", "model", "method", "rows", "state", "held-out loss", "accuracy", "last written")


@dataclass(frozen=True)
class ListedRun:
    """One run; None where a number is not known yet."""

    name: str
    model: str
    method: str
    rows: int | None  # to train on
    state: str  # starting, running, stopped, finished or damaged
    step: int
    steps: int | None
    held_out_loss: float | None
    held_out_accuracy: float | None
    written: str  # date and time of its last record

    @classmethod
    def read(cls, path: Path) -> ListedRun:
        """A run whose config.yaml is damaged is listed as such."""
        written = datetime.fromtimestamp(_written(path)).isoformat(" ", "minutes")
        try:
            run = RunHistory.read(path)
        except ConfigError:
            return cls(path.name, "", "", None, "damaged", 0, None, None, None, written)
        kept = run.best() or (run.held_out[-1] if run.held_out else {})
        return cls(
            path.name, bare_name(run.config.model), run.config.method, run.rows.get("train"), run.phase, run.step,
            run.total, kept.get("held_out_loss"), kept.get("held_out_accuracy"), written,
        )  # fmt: skip

    def cells(self) -> tuple[str, ...]:
        at = {
            "finished": f"finished, {self.step:,} steps",
            "starting": "starting",
            "damaged": f"damaged {RunFolder.config_file}",
        }.get(self.state, f"{self.state} at step {self.step:,}" + (f" of {self.steps:,}" if self.steps else ""))
        return (
            self.name, self.model, self.method, "" if self.rows is None else f"{self.rows:,}", at,
            "" if self.held_out_loss is None else f"{self.held_out_loss:.3f}",
            "" if self.held_out_accuracy is None else f"{100 * self.held_out_accuracy:.1f} %", self.written,
        )  # fmt: skip


def runs_in(folder: Path) -> list[Path]:
    """The runs directly in ``folder``, the one that was written to last first."""
    runs = [file.parent for file in folder.glob(f"*/{RunFolder.config_file}") if not file.parent.name.startswith(".")]
    return sorted(runs, key=lambda path: (-_written(path), path.name))


def holds_nothing_known(folder: Path) -> bool:
    """Whether a folder is empty, or holds only other folders."""
    return folder.is_dir() and not any(path.is_file() for path in folder.iterdir())


def refusal_of_no_runs(folder: Path) -> str:
    """The sentence for a folder that holds no run, and no model, adapter or rows either."""
    none = f"holds no run: none of its folders has a {RunFolder.config_file}"
    what = none if any(folder.iterdir()) else "is empty"
    return f"{folder} {what}; name a model, an adapter, rows, a run, or a folder with runs in it."


def listed(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The runs in ``folder`` as JSON values, and as the lines of a table."""
    runs = [ListedRun.read(path) for path in runs_in(folder)]
    many = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    lines = [f"{folder}: {many}, the newest first", *_aligned([_HEAD, *(run.cells() for run in runs)])]
    return {"kind": "runs", "runs": [asdict(run) for run in runs]}, lines


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width; one that is empty in all rows but the first is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in zip(*columns, strict=True)]  # fmt: skip


def _written(path: Path) -> float:
    run = RunFolder(path)
    return max(file.stat().st_mtime for file in (run.config_file, run.metrics_file) if file.is_file())
