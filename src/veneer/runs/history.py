"""What a run has done so far, read from its folder while it trains or afterwards."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from veneer.documents import parsed_json, read_json
from veneer.runs.folder import RunFolder
from veneer.runs.records import EvaluationRecord, PlanRecord, RowsRecord, checked
from veneer.training.config import TrainConfig
from veneer.training.metrics import OF_A_STEP, is_record, is_written
from veneer.training.state import STATE_NAME

Phase = Literal["starting", "running", "stopped", "finished"]
_RECENT = 50  # steps that the time left is reckoned from


class MetricsTail:
    """The records of a metrics.jsonl that grows. Only what is new is read, and all of it again where the file was
    replaced, as a resumed run does."""

    def __init__(self, run: Path) -> None:
        self._path = RunFolder(run).metrics_file
        self._inode: int | None = None
        self._offset = 0
        self.records: list[dict[str, Any]] = []
        self.rest = b""  # a line without its end: it is being written, or a kill cut it short
        self.damaged = 0  # lines

    def read(self) -> list[dict[str, Any]]:
        """All records so far."""
        try:
            file = self._path.open("rb")
        except OSError:
            self._forget(None)
            return self.records
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._forget(status.st_ino)
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        for line in lines:
            record = _record(line)
            if record is None:
                self.damaged += 1
            else:
                self.records.append(record)
        return self.records

    def _forget(self, inode: int | None) -> None:
        self._inode, self._offset = inode, 0
        self.records, self.rest, self.damaged = [], b"", 0


def _record(line: bytes) -> dict[str, Any] | None:
    """None for a line that is no record; a step's record has a number for every key that readers count on."""
    try:
        record = parsed_json(line, parse_constant=_no_number)
    except ValueError:
        return None
    whole = is_record(record) and ("loss" not in record or all(name in record for name in OF_A_STEP))
    return record if whole else None


def _no_number(name: str) -> None:
    raise ValueError(name)


@dataclass
class RunHistory:
    """A run's options and measurements; lists and dicts are empty where nothing was written yet."""

    folder: RunFolder
    config: TrainConfig
    phase: Phase
    total: int | None  # optimizer steps; None where the rows are not counted yet
    steps: list[dict[str, Any]]  # a record a step, in order
    held_out: list[dict[str, Any]]  # a record an evaluation
    ranks: dict[str, int]  # module → triplets of AdaLoRA at its last evaluation
    environment: dict[str, Any]
    rows: dict[str, Any]
    evaluation: dict[str, Any]
    plan: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # what could not be read
    advice: list[str] = field(default_factory=list, init=False)  # of a finished run, a sentence each

    @classmethod
    def read(cls, path: Path, tail: MetricsTail | None = None) -> RunHistory:
        """Raises ConfigError when config.yaml is damaged. Other files that are become a note."""
        folder, tail = RunFolder(path), tail or MetricsTail(path)
        written = is_written(folder.metrics_file)  # before the records, so that an ended run's are complete
        records = tail.read()
        notes = _damage_notes(tail, written)
        files = {
            name: _json(file, notes, kind)
            for name, file, kind in (
                ("environment", folder.environment_file, dict), ("rows", folder.rows_file, RowsRecord),
                ("evaluation", folder.evaluation_file, EvaluationRecord), ("plan", folder.plan_file, PlanRecord),
            )
        }  # fmt: skip
        config = folder.config()
        steps = [record for record in records if "loss" in record]
        ranks = [record["ranks"] for record in records if "ranks" in record]
        total = files["rows"].get("steps", config.steps)
        run = cls(
            folder, config, "stopped", total, steps, [record for record in records if "held_out_loss" in record],
            ranks[-1] if ranks else {}, notes=notes, **files,
        )  # fmt: skip
        if written:
            run.phase = "running"
        elif (run.has_adapter or run.has_model) and run._took_its_steps():
            run.phase, run.advice = "finished", _sentences(_json(folder.advice_file, notes))
        elif not folder.metrics_file.is_file():
            run.phase = "starting"
        return run

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def has_adapter(self) -> bool:
        return self.folder.result() == self.folder.adapter

    @property
    def has_model(self) -> bool:
        """Whether the result is a model of its own, not an adapter."""
        return self.folder.result() == self.folder.model

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    def _took_its_steps(self) -> bool:
        """As the loop judges it, by the last checkpoint, which is written when it ends: patience is counted there."""
        saved = self.folder.latest_checkpoint()
        worse = _json(saved / STATE_NAME, []).get("worse") if saved else 0
        patience = self.rows.get("chosen", {}).get("patience", self.config.patience)
        counted = isinstance(worse, int) and isinstance(patience, int)
        return self.total is None or self.step >= self.total or (counted and 0 < patience <= worse)

    def seconds(self) -> list[float]:
        """What each step took. Metrics hold its speed, and the tokens of all steps so far."""
        before = [0, *(record["tokens"] for record in self.steps)]
        return [
            (record["tokens"] - earlier) / record["tokens_per_second"]
            for record, earlier in zip(self.steps, before, strict=False)
        ]

    def seconds_left(self) -> float | None:
        """How long the remaining steps take at the pace of the latest ones; evaluations come on top."""
        if self.total is None or not self.steps:
            return None
        return max(0, self.total - self.step) * fmean(self.seconds()[-_RECENT:])

    @property
    def tokens_per_second(self) -> float | None:
        """The median of all steps."""
        return median(record["tokens_per_second"] for record in self.steps) if self.steps else None

    @property
    def peak_memory(self) -> int | None:
        """Bytes."""
        return max((record["peak_memory"] for record in self.steps), default=None)

    @property
    def predicted_peak(self) -> int | None:
        """Bytes, as planned before the run."""
        peak = self.plan.get("peak")
        return peak if isinstance(peak, int) else None

    @property
    def accuracies(self) -> list[dict[str, Any]]:
        """The evaluations that measured ``held_out_accuracy``, a share; none where the answers are no labels."""
        return [record for record in self.held_out if isinstance(record.get("held_out_accuracy"), (int, float))]

    @property
    def rewards(self) -> list[dict[str, Any]]:
        """The evaluations that measured ``held_out_reward_accuracy``, a share; none where rows have no preferences."""
        return [record for record in self.held_out if isinstance(record.get("held_out_reward_accuracy"), (int, float))]

    @property
    def objective(self) -> str:
        """What the run makes better: as asked, or as its rows are."""
        chosen = self.rows.get("chosen", {}).get("objective", "likelihood")
        return str(chosen) if self.config.objective == "auto" else self.config.objective

    @property
    def largest_class(self) -> float | None:
        """The share of the rows measured that have the most frequent label; None where it was not noted."""
        share = self.rows.get("largest_class")
        return float(share) if isinstance(share, (int, float)) else None

    def best(self) -> dict[str, Any] | None:
        """The record of the evaluation whose adapter is kept, the one with the lowest held-out loss. None before one
        counts: that of step 0 does not, nor does AdaLoRA's before its ranks are fixed."""
        mark = self.folder.best / "step"
        if not mark.is_file():
            return None
        number = mark.read_bytes().decode(errors="replace").strip()
        return next((record for record in reversed(self.held_out) if str(record["step"]) == number), None)


def _damage_notes(tail: MetricsTail, written: bool) -> list[str]:
    notes = []
    if tail.damaged:
        lines = "1 line" if tail.damaged == 1 else f"{tail.damaged} lines"
        notes.append(f"{RunFolder.metrics_file}: {lines} could not be read, and what they held is missing here.")
    if tail.rest and not written:
        notes.append(
            f"{RunFolder.metrics_file} ends within a line, where the run was cut off; the steps before it are all here."
        )
    return notes


def _sentences(content: dict[str, Any]) -> list[str]:
    advice = content.get("advice")
    return [str(sentence) for sentence in advice] if isinstance(advice, list) else []


def _json(path: Path, notes: list[str], kind: Any = dict) -> dict[str, Any]:
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return dict(checked(content, kind))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read ({error}), and what it held is missing here.")
        return {}
