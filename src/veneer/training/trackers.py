"""Runs logged elsewhere: MLflow and Weights & Biases, each a callback made of the run's options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.training.callbacks import Callback, EvaluationRecord, StepRecord
from veneer.training.config import TrainConfig


def refuse_missing(config: TrainConfig) -> None:
    """Raises ConfigError where ``log_to`` names a tracker whose package is not installed."""
    for name in config.log_to:
        if find_spec(name) is None:
            raise ConfigError(f"log_to: {name} needs a package that is not installed: pip install 'veneer[{name}]'.")


@contextmanager
def trackers(config: TrainConfig) -> Iterator[list[Callback]]:
    """The callbacks that ``log_to`` names, in a run of their own each; a run that fails is marked as failed there."""
    opened = {"mlflow": _mlflow, "wandb": _wandb}
    with ExitStack() as stack:
        yield [stack.enter_context(opened[name](config)) for name in config.log_to]


def _numbers(record: StepRecord) -> dict[str, float]:
    names = ("loss", "learning_rate", "gradient_norm", "tokens", "tokens_per_second", "peak_memory")
    return {name: getattr(record, name) for name in names}


def _held_out(record: EvaluationRecord) -> dict[str, float]:
    names = ("loss", "accuracy", "reward_accuracy", "reward_margin")
    numbers = {f"held_out_{name}": getattr(record, name) for name in names}
    numbers |= {f"held_out_{name.replace(':', '.')}": number for name, number in record.metrics.items()}
    return {name: number for name, number in numbers.items() if number is not None}


class _Mlflow:
    def __init__(self, mlflow: Any) -> None:
        self._mlflow = mlflow

    def on_step(self, record: StepRecord) -> None:
        self._mlflow.log_metrics(_numbers(record), step=record.step)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._mlflow.log_metrics(_held_out(record), step=record.step)


@contextmanager
def _mlflow(config: TrainConfig) -> Iterator[Callback]:
    import mlflow

    with mlflow.start_run(run_name=Path(config.output).name):
        mlflow.log_params({**config.changed(), "model": config.model, "data": config.data})
        yield _Mlflow(mlflow)


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def on_step(self, record: StepRecord) -> None:
        self._run.log(_numbers(record), step=record.step)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._run.log(_held_out(record), step=record.step)


@contextmanager
def _wandb(config: TrainConfig) -> Iterator[Callback]:
    import wandb

    with wandb.init(name=Path(config.output).name, config=config.model_dump()) as run:
        yield _Wandb(run)
