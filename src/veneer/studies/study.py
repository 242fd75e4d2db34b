"""What a study is: jobs that give rows of numbers, and what is read off the rows. No torch here.

The process that runs a study loads neither torch nor a model: each job has a process of its own (`work`).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from veneer.data.bbc import BBC_TOPICS
from veneer.data.sources import Source, sources_of
from veneer.device import AUTO
from veneer.studies.config import StudyOptions
from veneer.training.automatic import RATES

Row = dict[str, Any]  # column → number, text, or None


def key_of(values: Any) -> str:
    """Twelve hexadecimal digits of JSON values; equal values have equal ones."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """Work for one process: ``what`` of the study's kinds of work, and all that defines it, as JSON values.

    Two jobs of a study with the same key are the same; one that has its rows is not run again.
    """

    study: str
    what: str
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return key_of([self.what, self.options])

    def __str__(self) -> str:
        own = {name: value for name, value in self.options.items() if not isinstance(value, (dict, list))}
        seed = {"seed": run["seed"]} if (run := self.options.get("run")) else {}
        return ", ".join(
            [f"{self.study}: {self.what}", *(f"{name} {value}" for name, value in {**own, **seed}.items())]
        )


def located(model: str, data: str) -> dict[str, Any]:
    """A run's ``model`` and ``data``: what is on this machine by its full path, and under ``content`` a digest of it as
    it is now, since the same name may hold something else tomorrow."""
    parts = {"model": [Source(model)], "data": sources_of(data)}
    location: dict[str, Any] = {}
    content: dict[str, str] = {}
    for name, sources in parts.items():
        paths = [Path(source.name).expanduser() for source in sources]
        there = [path.exists() and source.name != BBC_TOPICS for path, source in zip(paths, sources, strict=True)]
        found = [
            Source(str(path.resolve()), source.times) if here else source
            for path, source, here in zip(paths, sources, there, strict=True)
        ]
        location[name] = ",".join(map(str, found))
        digests = [_digest(path, whole=name == "data") for path, here in zip(paths, there, strict=True) if here]
        content |= {name: ",".join(digests)} if digests else {}
    return location | ({"content": content} if content else {})


def _digest(path: Path, *, whole: bool) -> str:
    """A digest of a file of rows, which is read whole anyway; else of the names, sizes and dates of the files."""
    if whole and path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    about = [(str(file.relative_to(path)), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


class Study(ABC):
    """A question, the jobs that answer it, and how the answer is written and drawn."""

    name: ClassVar[str]
    title: ClassVar[str]  # the question, for a page's head
    columns: ClassVar[dict[str, str]]  # of its own, before `MEASURED`: column → what it means

    def __init__(self, options: StudyOptions) -> None:
        self.options = options
        self._located = located(options.model, options.data)

    @abstractmethod
    def jobs(self, rows: list[Row]) -> list[Job]:
        """The jobs that can be run once ``rows`` exist, those that gave them included."""

    @abstractmethod
    def findings(self, rows: list[Row]) -> str:
        """A paragraph of findings, written from the numbers; ``rows`` are those of all jobs."""

    @abstractmethod
    def draw(self, rows: list[Row], folder: Path) -> list[str]:
        """Write the plots into ``folder``; their names."""

    @classmethod
    @abstractmethod
    def work(cls, what: str, options: dict[str, Any], runs: Path) -> list[Row]:
        """Do a job, in a process of its own: the rows without their ``run``. Trained runs are in ``runs``."""

    @property
    def size(self) -> str:
        """How much was run, to begin the findings with."""
        seeds = len(self.options.seeds)
        return f"{seeds} seed{'s' if seeds > 1 else ''} of {self.options.steps} steps"

    def rate_for(self, method: str) -> float | Literal["auto"]:
        """The learning rate of a run: what is given for LoRA, times the factor of ``method``; or auto."""
        given = self.options.learning_rate
        return given if given == "auto" else float(f"{given * RATES[method] / RATES['lora']:.3g}")

    def run(self, seed: int, **over: Any) -> dict[str, Any]:
        """The options of a training run, as `work.run_config` takes them."""
        asked = self.options
        own = {name: getattr(asked, name) for name in ("steps", "batch_size", "held_out")}
        own |= {} if asked.compute == "auto" else {"compute": asked.compute}
        own |= {} if asked.device == AUTO else {"device": asked.device}
        return {**self._located, **own, "learning_rate": asked.learning_rate, "evaluate_every": 0, "seed": seed, **over}


MEASURED = {
    "seed": "seed of the split, of the order of rows, and of the initial values",
    "loss": "held-out loss, mean over learned tokens, nats",
    "accuracy": "share of the held-out rows whose answer is found the likeliest; empty where the answers are not few",
    "largest_class": "share of the held-out rows with the most frequent answer; empty where the answers are not few",
    "parameters": "parameters trained, or in the update that is measured",
    "seconds": "of training (of other work: in all)",
    "peak_memory": "largest resident memory of the process, bytes",
}
