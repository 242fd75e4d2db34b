"""A study's jobs over a Ray cluster: each a task in a process of its own, tried again when its worker is killed.

The folder of the runs must be one that every machine of the cluster sees. A task asks for one core, and torch then has
one thread in it; as many run at a time as the cluster has cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from veneer.errors import ConfigError, DivergedError, TrainingError
from veneer.studies.study import Job, Row
from veneer.threads import settle

_TRIES_AGAIN = 2


def over_ray(address: str, jobs: list[Job], runs: Path) -> Iterator[tuple[Job, list[Row] | DivergedError]]:
    """Each job with its rows, or with how it diverged, in the order in which they are done. ``address``: a cluster's,
    auto, or local.

    Raises ConfigError where Ray is not installed or there is no cluster, TrainingError when a job fails.
    """
    if find_spec("ray") is None:
        raise ConfigError("--ray needs Ray, which is not installed: pip install 'veneer[ray]'.")
    import ray

    began = not ray.is_initialized()
    if began:
        try:
            ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"No Ray cluster answers at {address!r} ({reason}); --ray local starts one here."
            ) from None
    try:
        # A worker does one task and ends, so that the peak memory is that task's.
        remote = ray.remote(num_cpus=1, max_calls=1, max_retries=_TRIES_AGAIN)(_work)
        doing = {remote.remote(job, str(runs.resolve())): job for job in jobs}
        while doing:
            (done, *_), _ = ray.wait(list(doing))
            job = doing.pop(done)
            outcome: list[Row] | DivergedError
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                # What a job said that refuses; Ray's first line where a worker is killed again and again.
                said = getattr(error, "cause", None) or str(error).strip().splitlines()[0]
                if not isinstance(said, DivergedError):
                    raise TrainingError(f"{job} failed: {said}") from None
                outcome = DivergedError(f"{job} failed: {said}")
            yield job, outcome
    finally:
        if began:
            ray.shutdown()


def _work(job: Job, runs: str) -> list[Row]:
    from veneer.studies.work import work

    settle()
    return work(job, Path(runs))
