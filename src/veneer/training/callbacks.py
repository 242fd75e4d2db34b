"""What a run reports while it trains, and to whom: two methods, one for a step and one for an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class StepRecord:
    """An optimizer step that has been taken."""

    step: int  # from 1
    total: int  # steps of the run
    loss: float  # mean over the step's learned tokens, nats; or over its rows with preferences
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens: int  # trained on so far, without padding
    tokens_per_second: float
    peak_memory: int  # bytes


@dataclass(frozen=True)
class EvaluationRecord:
    """A measurement of the held-out rows."""

    step: int  # 0: before the first step
    loss: float  # mean over learned tokens, nats; or over rows with preferences
    best: bool  # whether what is trained is kept as the best so far
    accuracy: float | None = None  # share of rows whose label is found the likeliest; None where there are no labels
    reward_accuracy: float | None = None  # share of rows whose better answer has the higher reward; of preferences
    reward_margin: float | None = None  # by how much, on average
    metrics: dict[str, float] = field(default_factory=dict)  # of answers, by name


class Callback(Protocol):
    """Gets each record after the run's own files have it; what it raises ends the run, which can be resumed.

    >>> class Printer:
    ...     def on_step(self, record: StepRecord) -> None:
    ...         print(f"{record.step} of {record.total}: {record.loss:.3f}")
    ...     def on_evaluation(self, record: EvaluationRecord) -> None:
    ...         print(f"held out: {record.loss:.3f}")
    """

    def on_step(self, record: StepRecord) -> None: ...

    def on_evaluation(self, record: EvaluationRecord) -> None: ...
