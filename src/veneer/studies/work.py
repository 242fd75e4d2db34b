"""A job in a process of its own: ``python -m veneer.studies.work JOB RUNS`` prints the job's rows as JSON.

A process of its own has a peak memory of its own, and one that is killed loses its job alone, which goes on from its
run's last checkpoint when it is tried again. It ends when its input does, which is when the process that started it has
ended, however that was.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.errors import DivergedError, VeneerError
from veneer.studies.study import Job, Row
from veneer.threads import settle

if TYPE_CHECKING:
    pass

DIVERGED = 3  # exit code of a job whose run diverged


def work(job: Job, runs: Path) -> list[Row]:
    """The rows of a job, each with the job's key as its ``run``."""
    from veneer.studies.kinds import STUDIES

    return [{"run": job.key, **row} for row in STUDIES[job.study].work(job.what, job.options, runs)]


def main() -> None:
    settle()
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    job = Job(**json.loads(sys.argv[1]))
    try:
        print(json.dumps(work(job, Path(sys.argv[2]))))
    except VeneerError as error:
        print(error, file=sys.stderr)
        sys.exit(DIVERGED if isinstance(error, DivergedError) else error.exit_code)


def _end_with_the_starter() -> None:
    os.read(0, 1)  # nothing is written: this returns when the pipe's other end is closed
    os._exit(1)


if __name__ == "__main__":
    main()
