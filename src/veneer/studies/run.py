"""A study from its options to its folder: the jobs whose rows are missing, one after another or over a Ray cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict
from pathlib import Path

from veneer.errors import ConfigError, DivergedError, TrainingError, did_you_mean
from veneer.files import locked
from veneer.studies.config import StudyOptions
from veneer.studies.folder import read_study_rows, write_study, write_study_rows
from veneer.studies.kinds import STUDIES
from veneer.studies.study import Job, Row, Study
from veneer.studies.work import DIVERGED

RUNS = "runs"
_TRIES = 3
_KILLED = 137  # a shell's exit code for a process that was killed, as some containers report it


def run_study(name: str, options: StudyOptions, say: Callable[[str], None] = print) -> Path:
    """Run what is missing of a study, draw it and write its findings; its folder.

    A row is written when its job is done, so a study that is stopped goes on where it was. A run that diverges leaves
    no row; the others are done before the study ends with what it said. Raises ConfigError for a study that does not
    exist and for a Ray cluster without Ray, DataError for a folder of another study, TrainingError when a job fails and
    when another process is at the same study.
    """
    if name not in STUDIES:
        raise ConfigError(f"There is no study {name!r}.{did_you_mean(name, STUDIES)} There are: {', '.join(STUDIES)}.")
    study = STUDIES[name](options)
    folder = Path(options.output or f"studies/{name}")
    try:
        with locked(folder, wait=False):
            rows = _all_rows(study, folder, say)
            findings = study.findings(rows)
            write_study(folder, study, rows, findings, study.draw(rows, folder))
    except BlockingIOError:
        raise TrainingError(
            f"Another process is at the study in {folder}; wait for it, or give another output."
        ) from None
    say(f"\n{findings}\n\nWritten to {folder}.")
    return folder


def _all_rows(study: Study, folder: Path, say: Callable[[str], None]) -> list[Row]:
    """The rows of all jobs; a job without rows is run, and its rows are written when it is done."""
    rows, ray = read_study_rows(folder, study), study.options.ray
    diverged: dict[str, DivergedError] = {}
    while missing := _missing(study, rows, diverged):
        say(f"{study.name}: {len(missing)} run{'s' if len(missing) > 1 else ''} to do; {folder} has {len(rows)} rows")
        doing = _over_ray(ray, missing, folder.parent / RUNS) if ray else _one_by_one(missing, folder)
        for job, outcome in doing:
            if isinstance(outcome, DivergedError):
                diverged[job.key] = outcome
                say(str(outcome))
                continue
            rows += outcome
            write_study_rows(folder, study, rows)
            write_study(folder, study, _own(study, rows), "", [])
            say(f"{job}: {_said(outcome)}")
    if diverged:
        (first, *more) = diverged.values()
        also = f" So did {len(more)} more." if more else ""
        raise TrainingError(f"{first}{also} All other runs of the study that could be done are done.")
    return _own(study, rows)


def _own(study: Study, rows: list[Row]) -> list[Row]:
    own = {job.key for job in study.jobs(rows)}
    return [row for row in rows if row["run"] in own]


def _missing(study: Study, rows: list[Row], diverged: Container[str]) -> list[Job]:
    done = {row["run"] for row in rows}
    jobs = {job.key: job for job in study.jobs(rows) if job.key not in done}
    return [job for key, job in jobs.items() if key not in diverged]


def _said(rows: list[Row]) -> str:
    row = next((row for row in reversed(rows) if row["loss"] is not None), rows[-1])
    accuracy = "" if row["accuracy"] is None else f", accuracy {100 * row['accuracy']:.1f} %"
    loss = "" if row["loss"] is None else f"loss {row['loss']:.3f}{accuracy}, "
    return f"{loss}{row['seconds'] or 0:.0f} s"


def _one_by_one(jobs: list[Job], folder: Path) -> Iterator[tuple[Job, list[Row] | DivergedError]]:
    for job in jobs:
        try:
            yield job, in_a_process(job, folder.parent / RUNS)
        except DivergedError as error:
            yield job, error


def in_a_process(job: Job, runs: Path) -> list[Row]:
    """The job's rows. One whose process is killed is tried again. Raises TrainingError with what it said, DivergedError
    where its run diverged."""
    command = [sys.executable, "-m", "veneer.studies.work", json.dumps(asdict(job)), str(runs)]
    read, write = os.pipe()  # held as long as this process lives: then the other one ends, too
    try:
        for _ in range(_TRIES):
            done = subprocess.run(command, stdin=read, capture_output=True, text=True, check=False)
            if done.returncode >= 0 and done.returncode != _KILLED:
                break
    finally:
        os.close(read)
        os.close(write)
    if done.returncode:
        killed = done.returncode < 0 or done.returncode == _KILLED
        said = "it was killed, for want of memory perhaps" if killed else (done.stderr.strip() or "?").splitlines()[-1]
        raise (DivergedError if done.returncode == DIVERGED else TrainingError)(f"{job} failed: {said}")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _over_ray(address: str, jobs: list[Job], runs: Path) -> Iterator[tuple[Job, list[Row] | DivergedError]]:
    from veneer.studies.cluster import over_ray

    return over_ray(address, jobs, runs)
