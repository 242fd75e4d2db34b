"""Several runs side by side, as values: options that differ, what was measured, and the curves together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from veneer.documents import read_json
from veneer.reporting.charts import Chart, Series, displayed, gigabytes, smoothed
from veneer.reporting.run_page import option_text
from veneer.runs.folder import RunFolder
from veneer.runs.history import RunHistory
from veneer.training.progress import clock
from veneer.training.state import STATE_NAME

Rows = list[list[str]]
_MEASURES = {
    "loss": "evaluated loss", "perplexity": "evaluated perplexity", "choice_accuracy": "evaluated choice accuracy",
    "exact_match": "evaluated exact match", "macro_f1": "evaluated mean F1",
    "preferred": "evaluated chosen likelier than rejected",
}  # fmt: skip
_SHARES = ("choice_accuracy", "exact_match", "macro_f1", "preferred")
_OF_TOKENS = (  # which are measured
    *("model", "data", "columns", "shape", "bad_rows", "held_out", "seed", "task", "template", "learn", "max_length"),
    *("long_rows", "system"),
)
_SMOOTHED_FROM = 50  # steps, as on the page of a run


@dataclass(frozen=True)
class RunsCompared:
    """Two runs or more, each with a ``label`` of its own: its folder's name, or its path where two have one name."""

    runs: list[RunHistory]
    labels: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> RunsCompared:
        """Raises ConfigError where a config.yaml is damaged."""
        runs = [RunHistory.read(path) for path in paths]
        names = [run.name for run in runs]
        labels = [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]
        return cls(runs, labels)

    @property
    def same_rows(self) -> bool:
        """Whether all have the same rows, as the same tokens, so that their losses compare; by their checkpoints."""
        digests = {_digest(run) for run in self.runs}
        return len(digests) == 1 and None not in digests

    def notes(self) -> list[str]:
        """What a reader should know before comparing, a sentence each."""
        notes = [f"{label}: {note}" for label, run in zip(self.labels, self.runs, strict=True) for note in run.notes]
        if not self.same_rows:
            names = [row[0] for row in self.differing if row[0] in _OF_TOKENS]
            why = f" ({', '.join(names)} {'differs' if len(names) == 1 else 'differ'})" if names else ""
            notes.insert(0, f"These runs are not known to have the same rows as the same tokens{why}, so their losses "
                            f"need not compare.")  # fmt: skip
        return notes

    @cached_property
    def differing(self) -> Rows:
        """Options that are not the same in all runs: name, and each run's value."""
        return [row for row in self._options() if len(set(row[1:])) > 1]

    @cached_property
    def same(self) -> list[tuple[str, str]]:
        """Options that all runs have alike, and that are not the default."""
        changed = set(self.runs[0].config.changed())
        return [(row[0], row[1]) for row in self._options() if len(set(row[1:])) == 1 and row[0] in changed]

    def _options(self) -> Rows:
        names = [name for name in type(self.runs[0].config).model_fields if name != "output"]
        return [[name, *(_option(run, name) for run in self.runs)] for name in names]

    @cached_property
    def machines(self) -> Rows:
        """Versions and machine, where they differ."""
        names = dict.fromkeys(name for run in self.runs for name in run.environment)
        rows = [[name, *(option_text(run.environment.get(name)) for run in self.runs)] for name in names]
        return [row for row in rows if len(set(row[1:])) > 1]

    def scores(self) -> Rows:
        """What was measured, each run's in its column; nothing that no run has."""
        rows = [[title, *map(value, self.runs)] for title, value in _SCORES.items()]
        rows += [[title, *(_evaluated(run, name) for run in self.runs)] for name, title in _MEASURES.items()]
        return [row for row in rows if any(row[1:])]

    def lowest(self) -> str:
        """A sentence that names the run of the lowest held-out loss, where these compare; else nothing."""
        losses = [_kept_loss(run) for run in self.runs]
        known = [loss for loss in losses if loss is not None]
        if len(known) < len(losses) or not self.same_rows:
            return ""
        return f"Lowest held-out loss: {self.labels[losses.index(min(known))]}, {min(known):.3f}."

    def charts(self) -> list[Chart]:
        """The runs' curves together, those that there are numbers for."""
        charts = [
            self._chart("held-out-loss", "Held-out loss", "mean loss of a learned token, nats", _held_out),
            self._chart("accuracy", "Held-out accuracy", "share of the held-out rows, %", _accuracy),
            self._chart("loss", "Training loss", "mean loss of a learned token, nats", _losses),
            self._chart("learning-rate", "Learning rate", "AdamW's rate", _of("learning_rate")),
            self._chart("speed", "Speed", "tokens a second, without padding", _of("tokens_per_second")),
            self._chart("memory", "Memory", "peak of the process so far, GB", _of("peak_memory", 1e-9)),
        ]
        return [chart for chart in charts if chart.series]

    def _chart(self, name: str, title: str, y: str, points: Callable[[RunHistory], list[Any]]) -> Chart:
        drawn = [Series(label, points(run)) for label, run in zip(self.labels, self.runs, strict=True)]
        chart = Chart(name, title, "step", y, tuple(one for one in drawn if one.points))
        smooth = name == "loss" and any(len(run.steps) >= _SMOOTHED_FROM for run in self.runs)
        return replace(chart, note=f"From {_SMOOTHED_FROM} steps on, means of several.") if smooth else chart


def _option(run: RunHistory, name: str) -> str:
    value = getattr(run.config, name)
    chosen = run.rows.get("chosen", {}).get(name)
    if value == "auto" and isinstance(chosen, int | float | str):
        return f"auto: {chosen}" if isinstance(chosen, str) else f"auto: {chosen:g}"
    if name in ("data", "held_out") and Path(str(value)).parent == run.folder.path:
        file = Path(str(value))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8] if file.is_file() else "missing"
        return f"rows from memory ({digest})"
    return option_text(value)


def _digest(run: RunHistory) -> str | None:
    """The digest of a run's rows as tokens; None where no checkpoint has it."""
    saved = run.folder.latest_checkpoint()
    try:
        state = read_json(saved / STATE_NAME) if saved else {}
    except (OSError, ValueError):
        return None
    digest = state.get("data") if isinstance(state, dict) else None
    return str(digest) if digest else None


def _kept(run: RunHistory) -> dict[str, Any] | None:
    """The evaluation of what is the result; before there is a best one, the latest."""
    return run.best() or (run.held_out[-1] if run.held_out else None)


def _kept_loss(run: RunHistory) -> float | None:
    kept = _kept(run)
    return None if kept is None else float(kept["held_out_loss"])


def _state(run: RunHistory) -> str:
    of = f" of {run.total:,}" if run.total is not None and run.phase != "finished" else ""
    return f"{run.phase}, {run.step:,}{of} steps"


def _first_loss(run: RunHistory) -> str:
    first = run.held_out[0] if run.held_out and run.held_out[0]["step"] == 0 else None
    return "" if first is None else f"{first['held_out_loss']:.3f}"


def _best_loss(run: RunHistory) -> str:
    kept = _kept(run)
    return "" if kept is None else f"{kept['held_out_loss']:.3f} at step {kept['step']:,}"


def _best_accuracy(run: RunHistory) -> str:
    kept = _kept(run)
    share = None if kept is None else kept.get("held_out_accuracy")
    return _share(share)


def _share(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else ""


def _evaluated(run: RunHistory, name: str) -> str:
    """What veneer evaluate measured of the trained side; and on which rows, where these are no held-out ones."""
    trained = run.evaluation.get("adapter")
    value = trained.get(name) if isinstance(trained, dict) else None
    if not isinstance(value, int | float):
        return ""
    other = run.evaluation.get("data")
    return (_share(value) if name in _SHARES else displayed(value)) + (f" on {other}" if other else "")


# What is measured of a run → its value as text, empty where there is none.
_SCORES: dict[str, Callable[[RunHistory], str]] = {
    "state": _state,
    "rows trained on": lambda run: displayed(run.rows.get("train")),
    "held-out rows": lambda run: displayed(run.rows.get("held_out")),
    "held-out loss before": _first_loss,
    "held-out loss": _best_loss,
    "held-out accuracy": _best_accuracy,
    "largest class": lambda run: _share(run.largest_class),
    "time in steps": lambda run: clock(sum(run.seconds())) if run.steps else "",
    "tokens a second": lambda run: displayed(round(run.tokens_per_second)) if run.tokens_per_second else "",
    "peak memory": lambda run: "" if run.peak_memory is None else gigabytes(run.peak_memory),
    "predicted peak": lambda run: "" if run.predicted_peak is None else gigabytes(run.predicted_peak),
}


def _held_out(run: RunHistory) -> list[Any]:
    return [(record["step"], record["held_out_loss"]) for record in run.held_out]


def _accuracy(run: RunHistory) -> list[Any]:
    return [(record["step"], 100 * record["held_out_accuracy"]) for record in run.accuracies]


def _losses(run: RunHistory) -> list[Any]:
    points = [(record["step"], record["loss"]) for record in run.steps]
    return smoothed(points, max(5, len(points) // 25)) if len(points) >= _SMOOTHED_FROM else points


def _of(key: str, times: float = 1) -> Callable[[RunHistory], list[Any]]:
    return lambda run: [(record["step"], times * record[key]) for record in run.steps if key in record]


def beside(paths: Sequence[Path]) -> Path:
    """Where the page of these runs is written by default: beside the first one."""
    return RunFolder(paths[0]).path.resolve().parent / "comparison.html"
