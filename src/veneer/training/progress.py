"""A run's progress on the screen: a live line in a terminal or a notebook, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from veneer.notebook import LiveLine, is_notebook
from veneer.training.callbacks import EvaluationRecord, StepRecord

_PLAIN_LINES = 20  # a run writes about this many when it is not watched


class RunProgress:
    """Shows steps, losses, speed and memory on ``console``."""

    def __init__(self, console: Console, total: int, step: int) -> None:
        self._console, self._total = console, total
        self._every = max(1, total // _PLAIN_LINES)
        self._first: tuple[int, float] | None = None  # step and time that the time left is reckoned from
        self._held_out = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, completed=step, numbers="")
        self._line = LiveLine() if is_notebook(console) else None

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_step(self, record: StepRecord) -> None:
        step, speed, memory = record.step, record.tokens_per_second, record.peak_memory
        numbers = f"loss {record.loss:.3f}{self._held_out} · {speed:,.0f} tokens/s · {memory / 1e9:.1f} GB"
        self._bar.update(self._task, completed=step, numbers=numbers)
        first_step, started = self._first = self._first or (step - 1, time.monotonic())
        taken = step - first_step - 1  # since the first step ended, from which time is counted
        left = f" · {clock((time.monotonic() - started) / taken * (self._total - step))} left" if taken else ""
        if self._line is not None:
            self._line.show(f"step {step}/{self._total}  {numbers}{left}")
        elif not self._console.is_terminal and (step % self._every == 0 or step == self._total):
            self.note(f"step {step}/{self._total}  {numbers}{left}")

    def on_evaluation(self, record: EvaluationRecord) -> None:
        right = "" if record.accuracy is None else f", {100 * record.accuracy:.1f} % right"
        if record.reward_accuracy is not None:
            margin = "" if record.reward_margin is None else f", margin {record.reward_margin:.3f}"
            right = f", rewards {100 * record.reward_accuracy:.1f} % right{margin}"
        right += "".join(f", {name} {value:.4g}" for name, value in record.metrics.items())
        self._held_out = f" · held-out {record.loss:.3f}{right}"
        best = " (best so far)" if record.best and record.step else ""
        self.note(f"step {record.step}: held-out loss {record.loss:.4f}{right}{best}")


_AT_ONCE = 256  # rows between two looks at the clock
_SOON = 3.0  # seconds of work of which nothing is said
_SELDOM = 15.0  # seconds between two lines, where there is no live one

T = TypeVar("T")


def counted(console: Console, items: Sequence[T], doing: str) -> Iterator[T]:
    """The items, while ``console`` shows how many are done; nothing where they take a few seconds.

    ``doing``: what is done to them, with their name: "tokenising rows".
    """
    line = LiveLine() if is_notebook(console) else None
    started = told = time.monotonic()
    with Progress(
        TextColumn(doing), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(doing, total=len(items), visible=False)
        for number, item in enumerate(items):
            now = time.monotonic() if number % _AT_ONCE == 0 else started
            if number and now - started > _SOON:
                bar.update(task, completed=number, visible=True)
                left = clock((now - started) / number * (len(items) - number))
                said = f"{doing}: {number:,}/{len(items):,} · {left} left"
                if line is not None:
                    line.show(said)
                elif not console.is_terminal and now - told > _SELDOM:
                    told = now
                    console.print(said, highlight=False, markup=False, soft_wrap=True)
            yield item


def clock(seconds: float) -> str:
    """Seconds as 0:07 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
