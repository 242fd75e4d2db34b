"""How far a prediction is: a live line in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from veneer.training.progress import clock

_PLAIN_LINES = 10


class PredictionProgress:
    def __init__(self, console: Console, total: int, done: int) -> None:
        self._console, self._total, self._first, self._done = console, total, done, done
        self._started, self._next = time.monotonic(), float(done)
        self._bar = Progress(
            TextColumn("predicting"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("predicting", total=total, completed=done, speed="")

    def __enter__(self) -> PredictionProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def add(self, rows: int) -> None:
        self._done += rows
        speed = (self._done - self._first) / max(1e-9, time.monotonic() - self._started)
        self._bar.update(self._task, completed=self._done, speed=f"{speed:,.1f} rows/s")
        if not self._console.is_terminal and (self._done >= self._next or self._done == self._total):
            self._next = self._done + self._total / _PLAIN_LINES
            left = "" if self._done == self._total else f" · {clock((self._total - self._done) / speed)} left"
            self.note(f"{self._done:,}/{self._total:,} rows · {speed:,.1f} rows/s{left}")

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
