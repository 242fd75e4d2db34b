"""A study from its options to its folder: the jobs whose rows are missing, one after another or over a Ray cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from veneer.commands.verbs import StudyOptions
from veneer.errors import ConfigError, TrainingError, did_you_mean
from veneer.studies.budget import BudgetStudy
from veneer.studies.folder import read_rows, write_rows, write_study
from veneer.studies.matrices import MatricesStudy
from veneer.studies.methods import MethodsStudy
from veneer.studies.rank import RankStudy
from veneer.studies.spectrum import SpectrumStudy
from veneer.studies.storage import StorageStudy
from veneer.studies.study import Job, Row, Study

STUDIES: dict[str, type[Study]] = {
    study.name: study for study in (RankStudy, MatricesStudy, MethodsStudy, StorageStudy, BudgetStudy, SpectrumStudy)
}
RUNS = "runs"
_TRIES = 3
_KILLED = 137  # a shell's exit code for a process that was killed, as some containers report it


def run_study(name: str, options: StudyOptions, say: Callable[[str], None] = print) -> Path:
    """Run what is missing of a study, draw it and write what was found; its folder.

    A row is written when its job is done, so a study that is stopped goes on where it was. Raises ConfigError for a
    study that does not exist and for a Ray cluster without Ray, TrainingError when a job fails.
    """
    if name not in STUDIES:
        raise ConfigError(f"There is no study {name!r}.{did_you_mean(name, STUDIES)} There are: {', '.join(STUDIES)}.")
    study = STUDIES[name](options)
    folder = Path(options.output or f"studies/{name}")
    rows = read_rows(folder)
    write_study(folder, study, [], "", [])
    while missing := _missing(study, rows):
        say(f"{name}: {len(missing)} run{'s' if len(missing) > 1 else ''} to do; {folder} has {len(rows)} rows")
        doing = _over_ray(options.ray, missing, folder.parent / RUNS) if options.ray else _one_by_one(missing, folder)
        for job, found in doing:
            rows += found
            write_rows(folder, study, rows)
            say(f"{job}: {_said(found)}")
    own = {job.key for job in study.jobs(rows)}
    rows = [row for row in rows if row["run"] in own]
    findings = study.findings(rows)
    write_study(folder, study, rows, findings, study.draw(rows, folder))
    say(f"\n{findings}\n\nWritten to {folder}.")
    return folder


def _missing(study: Study, rows: list[Row]) -> list[Job]:
    done = {row["run"] for row in rows}
    return list({job.key: job for job in study.jobs(rows) if job.key not in done}.values())


def _said(rows: list[Row]) -> str:
    row = next((row for row in reversed(rows) if row["loss"] is not None), rows[-1])
    accuracy = "" if row["accuracy"] is None else f", accuracy {100 * row['accuracy']:.1f} %"
    loss = "" if row["loss"] is None else f"loss {row['loss']:.3f}{accuracy}, "
    return f"{loss}{row['seconds'] or 0:.0f} s"


def _one_by_one(jobs: list[Job], folder: Path) -> Iterator[tuple[Job, list[Row]]]:
    for job in jobs:
        yield job, in_a_process(job, folder.parent / RUNS)


def in_a_process(job: Job, runs: Path) -> list[Row]:
    """The job's rows. One whose process is killed is tried again. Raises TrainingError with what it said."""
    command = [sys.executable, "-m", "veneer.studies.work", json.dumps(asdict(job)), str(runs)]
    for _ in range(_TRIES):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode >= 0 and done.returncode != _KILLED:
            break
    if done.returncode:
        killed = done.returncode < 0 or done.returncode == _KILLED
        said = "it was killed, for want of memory perhaps" if killed else (done.stderr.strip() or "?").splitlines()[-1]
        raise TrainingError(f"{job} failed: {said}")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _over_ray(address: str, jobs: list[Job], runs: Path) -> Iterator[tuple[Job, list[Row]]]:
    from veneer.studies.cluster import over_ray

    return over_ray(address, jobs, runs)
