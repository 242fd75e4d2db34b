"""A training run of a study, trained once for all studies that ask for it, and what is measured of it."""

from __future__ import annotations

import io
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.documents import read_json
from veneer.errors import DataError, DivergedError
from veneer.files import locked, write_text
from veneer.studies.study import Row, key_of, located

if TYPE_CHECKING:
    from veneer.runs.prepare import Prepared
    from veneer.training.config import TrainConfig


MEASURED_NAME = "measured.json"
LOCKS = ".locks"  # of the folder of all runs


def trained(options: dict[str, Any], runs: Path) -> tuple[Path, Row]:
    """The folder of the run with these options, and what was measured of it: trained once, whichever study asks.

    A run that was killed on its way goes on. Two processes that ask for one run wait for each other.
    """
    from veneer.runs.folder import RunFolder

    folder = runs / key_of(options)
    config = run_config(options, str(folder), keep_checkpoints=1)
    with locked(runs / LOCKS / folder.name, wait=True):  # the folder itself is held while it trains
        if not (folder / MEASURED_NAME).is_file():
            write_text(folder / MEASURED_NAME, json.dumps(_train(config, folder)) + "\n")
        run = RunFolder(folder)
        for part in (run.checkpoints, run.best):  # the result is complete, and these are several times as large
            shutil.rmtree(part, ignore_errors=True)
    row: Row = read_json(folder / MEASURED_NAME)
    return folder, row


def rate_taken(folder: Path) -> float:
    """The highest learning rate of the run in ``folder``."""
    from veneer.runs.folder import RunFolder

    run = RunFolder(folder)
    return float(run.chosen().get("learning_rate") or run.config().learning_rate)


def _train(config: TrainConfig, folder: Path) -> Row:
    from rich.console import Console

    from veneer.device import device_of, peak_memory
    from veneer.kernels.heap import own_heap
    from veneer.runs import train as runs
    from veneer.runs.folder import RunFolder
    from veneer.runs.prepare import prepare
    from veneer.updates.trainable import trainable

    own_heap()
    how: dict[str, Any] = {"console": Console(file=io.StringIO()), "on_the_way": False}  # more is measured below
    run = RunFolder(folder)
    result = runs.resume(folder, **how) if run.exists else runs.train(config=config, **how)
    # Training's peak, in whichever process it was; what is measured after it is in batches of its own.
    memory = max(peak_memory(device_of(result.model)), *(record.get("peak_memory", 0) for record in run.metrics()))
    table = trainable(result.model)
    reached = quality(prepare(config, result.model, result.tokenizer))
    if not math.isfinite(reached["loss"]):
        raise DivergedError(f"The held-out loss is not finite after {result.steps} steps.")
    return {
        "seed": config.seed, **reached, "parameters": table.parameters, "seconds": round(result.seconds, 2),
        "peak_memory": memory,
    }  # fmt: skip


def run_config(options: dict[str, Any], output: str, **more: Any) -> TrainConfig:
    """The run with the options that `Study.run` made. Raises DataError where the content they were made of is no longer
    there."""
    from veneer.training.config import TrainConfig

    own = {name: value for name, value in options.items() if name != "content"}
    if "content" in options and located(own["model"], own["data"]).get("content") != options["content"]:
        raise DataError(f"{own['model']} or {own['data']} was changed while the study ran; start the study again.")
    return TrainConfig(**own, output=output, **more)


def quality(prepared: Prepared) -> Row:
    """Held-out loss and accuracy of the model as it is."""
    from veneer.evaluation.compare import measure
    from veneer.generation.likelihood import choices_of

    renderer, rows = prepared.renderer, prepared.held_out
    choices = list(renderer.classes) or choices_of(prepared.train, rows)
    scores = measure(prepared.model, renderer, rows, choices, False, 32)
    largest = None if scores.classes is None else scores.classes.largest
    return {"loss": scores.loss, "accuracy": scores.choice_accuracy, "largest_class": largest}


@contextmanager
def timed(row: Row) -> Iterator[None]:
    """Put the seconds of the block and the peak memory after it into ``row``."""
    from veneer.device import CPU, peak_memory

    started = time.monotonic()
    yield
    row |= {"seconds": round(time.monotonic() - started, 2), "peak_memory": peak_memory(CPU)}
