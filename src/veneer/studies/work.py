"""A job in a process of its own: ``python -m veneer.studies.work JOB RUNS`` prints the job's rows as JSON.

A process of its own has a peak memory of its own, and one that is killed loses its job alone, which goes on from its
run's last checkpoint when it is tried again.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import VeneerError
from veneer.files import write_text
from veneer.studies.study import Job, Row, key_of
from veneer.threads import settle

if TYPE_CHECKING:
    from veneer.training.prepare import Prepared

MEASURED_NAME = "measured.json"


def work(job: Job, runs: Path) -> list[Row]:
    """The rows of a job, each with the job's key as its ``run``."""
    from veneer.studies.run import STUDIES

    return [{"run": job.key, **row} for row in STUDIES[job.study].work(job.what, job.options, runs)]


def trained(options: dict[str, Any], runs: Path) -> tuple[Path, Row]:
    """The folder of the run with these options, and what was measured of it: trained once, whichever study asks.

    A run that was killed on its way goes on.
    """
    from rich.console import Console

    from veneer.training import run
    from veneer.training.config import CONFIG_NAME, TrainConfig
    from veneer.training.metrics import peak_memory
    from veneer.training.prepare import prepare
    from veneer.updates.trainable import trainable

    folder = runs / key_of(options)
    if (folder / MEASURED_NAME).is_file():
        return folder, json.loads((folder / MEASURED_NAME).read_text(encoding="utf-8"))
    silent = Console(file=io.StringIO())
    if (folder / CONFIG_NAME).is_file():
        result = run.resume(folder, console=silent)
    else:
        result = run.train(config=TrainConfig(**options, output=str(folder), keep_checkpoints=1), console=silent)
    memory = peak_memory()  # of training; what is measured after it is in batches of its own
    table = trainable(result.model)
    prepared = prepare(TrainConfig.read(folder / CONFIG_NAME), result.model, result.tokenizer)
    row = {
        "seed": options["seed"], **quality(prepared), "parameters": table.parameters,
        "seconds": round(result.seconds, 2), "peak_memory": memory,
    }  # fmt: skip
    for name in ("checkpoints", "best"):  # the result is there, and these are several times as large
        shutil.rmtree(folder / name, ignore_errors=True)
    write_text(folder / MEASURED_NAME, json.dumps(row) + "\n")
    return folder, row


def quality(prepared: Prepared) -> Row:
    """Held-out loss and accuracy of the model as it is."""
    from veneer.evaluation.compare import measure
    from veneer.evaluation.likelihood import choices_of

    tokeniser, rows = prepared.tokeniser, prepared.held_out
    choices = list(tokeniser.classes) or choices_of([*prepared.train, *rows])
    scores = measure(prepared.model, tokeniser, rows, choices, False, 32)
    return {"loss": scores.loss, "accuracy": scores.choice_accuracy}


@contextmanager
def timed(row: Row) -> Iterator[None]:
    """Put the seconds of the block and the peak memory after it into ``row``."""
    from veneer.training.metrics import peak_memory

    started = time.monotonic()
    yield
    row |= {"seconds": round(time.monotonic() - started, 2), "peak_memory": peak_memory()}


def main() -> None:
    settle()
    job = Job(**json.loads(sys.argv[1]))
    try:
        print(json.dumps(work(job, Path(sys.argv[2]))))
    except VeneerError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
