"""A run's folder: the one place that names its files and reads them. No torch here.

run/
  config.yaml  data.jsonl  chat_template.jinja  rows.json  environment.json  plan.json  metrics.jsonl  advice.json
  evaluation.json  report.html  reference.safetensors
  adapter/ (or model/)  best/  base/  start/  tokenizer/  checkpoints/step-000200/  tensorboard/
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

from veneer.data.forms import FORMS, MODES
from veneer.data.sources import Source, sources_of
from veneer.documents import read_json
from veneer.errors import TrainingError, did_you_mean
from veneer.files import locked, remove_leftovers
from veneer.runs.records import RowsRecord, checked
from veneer.training.config import TrainConfig
from veneer.training.metrics import read_metrics
from veneer.training.state import checkpoints_in

_OF_ROWS = ("data", "held_out")  # options that name several sources


def _from_start(name: str, starts: tuple[Path, ...]) -> str:
    """A relative path that is in one of ``starts``, from there; any other name as it is."""
    if Path(name).expanduser().is_absolute():
        return name
    file = name if ":" not in name else name.rpartition(":")[0]  # a data set's split
    start = next((start for start in starts if (start / file).exists() or (start / name).exists()), None)
    return name if start is None else os.path.normpath(start / name)


class _Inside:
    """A file or folder of a run, by its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, run: None, owner: type[RunFolder]) -> str: ...
    @overload
    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path: ...
    def __get__(self, run: RunFolder | None, owner: type[RunFolder]) -> Path | str:
        return self._name if run is None else run.path / self._name


class RunFolder:
    """The files of the run in ``path``, whether they are written yet or not.

    ``RunFolder("runs/first").config_file`` is a path; ``RunFolder.config_file`` the bare name.
    """

    config_file = _Inside("config.yaml")  # every option; its presence makes the folder a run
    data_file = _Inside("data.jsonl")  # the rows, where they came in memory
    held_out_file = _Inside("held-out.jsonl")  # the held-out rows, where they came in memory
    rows_file = _Inside("rows.json")  # what the rows were, and the number of steps
    environment_file = _Inside("environment.json")  # versions and machine
    plan_file = _Inside("plan.json")  # predicted memory and time
    metrics_file = _Inside("metrics.jsonl")  # a line a step and a line an evaluation
    advice_file = _Inside("advice.json")  # what a finished run says of its learning, a sentence each
    evaluation_file = _Inside("evaluation.json")  # what veneer evaluate measured
    report_file = _Inside("report.html")  # what veneer report wrote
    template_file = _Inside("chat_template.jinja")  # the chat template, where it came from a file
    reference_file = _Inside("reference.safetensors")  # what the model said of both answers of each row, untrained
    adapter = _Inside("adapter")  # the result: a PEFT folder
    model = _Inside("model")  # or, where the model's own weights are trained: a transformers folder
    best = _Inside("best")  # the adapter (or weights) with the lowest held-out loss so far
    tokenizer = _Inside("tokenizer")  # where it is not the model's own: it came changed in memory
    start = _Inside("start")  # the adapter that it started from, copied, where it did
    base = _Inside("base")  # the base, where LoftQ changed it
    checkpoints = _Inside("checkpoints")
    tensorboard = _Inside("tensorboard")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether this is a run's folder."""
        return self.config_file.is_file()

    def config(self, **over: Any) -> TrainConfig:
        """The run's options; ``over`` wins. Rows that came in memory and a chat template that came from a file are
        found in this folder, wherever it is now; relative paths from where the run was started, if that is elsewhere.

        Raises ConfigError for a damaged file.
        """
        config = TrainConfig.read(self.config_file, output=str(self.path), **over)
        kept = {"data": self.data_file, "held_out": self.held_out_file}
        own = {
            option: str(file)
            for option, file in kept.items()
            if Path(str(getattr(config, option))).name == file.name and file.is_file()
        }
        if self.template_file.is_file() and config.template not in (*MODES, *FORMS):
            own["template"] = str(self.template_file)
        return config.model_copy(update={**self._paths_from_its_start(config), **own})

    def working_folder(self) -> dict[str, str]:
        """The working folder, as it is noted in `rows.json`, and its place relative to the run."""
        here = Path.cwd()
        return {"folder": str(here), "folder_from_run": os.path.relpath(here, self.path.absolute())}

    def _paths_from_its_start(self, config: TrainConfig) -> dict[str, str]:
        """Option → path, where a relative one names something from the working folder of the run's start, or, if the
        run and it were moved together, from the same place beside the run."""
        try:
            noted = self.rows()
        except TrainingError:  # a file that is missing or damaged
            return {}
        if "folder" not in noted or Path(noted["folder"]) == Path.cwd():
            return {}
        starts = (Path(noted["folder"]), self.path.absolute() / noted["folder_from_run"])
        paths = {}
        for option in ("model", "data", "held_out", "adapter"):
            value = getattr(config, option)
            if not isinstance(value, str):
                continue
            one = option not in _OF_ROWS or any((start / value).exists() for start in starts)
            sources = [Source(value)] if one else sources_of(value)
            found = [Source(_from_start(source.name, starts), source.times) for source in sources]
            if (text := ",".join(map(str, found))) != value:
                paths[option] = text
        return paths

    def rows(self) -> dict[str, Any]:
        """What `rows.json` says: shape, train, held_out, classes, choices, date, steps, chosen, largest_class …

        Raises TrainingError where the file is missing or damaged.
        """
        try:
            rows = dict(checked(read_json(self.rows_file), RowsRecord))
            for name in ("classes", "conversations"):  # without which no model is opened as it was trained
                if name not in rows:
                    raise ValueError(f"it has no {name}")
            return rows
        except (OSError, ValueError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise TrainingError(
                f"{self.rows_file}, which says what the run's rows were, cannot be read ({said}); copy it again from "
                f"where the run was made, or train again."
            ) from None

    def chosen(self) -> dict[str, Any]:
        """The numbers that were chosen for options that are ``auto``: option → number; none before the run began."""
        return dict(self.rows().get("chosen", {})) if self.exists and self.rows_file.is_file() else {}

    def date(self) -> str | None:
        """The ISO date on which the run began; None where there is no run yet, or one that did not note it."""
        date: str | None = None
        with suppress(TrainingError):  # a file that is missing or damaged
            date = self.rows().get("date")
        return date

    def metrics(self) -> list[dict[str, Any]]:
        """The records of all steps and evaluations so far."""
        return read_metrics(self.metrics_file)

    def latest_checkpoint(self) -> Path | None:
        """The last complete checkpoint."""
        complete = checkpoints_in(self.checkpoints)
        return complete[-1] if complete else None

    def result(self) -> Path | None:
        """adapter/ or model/ of a finished run; None before it has finished."""
        for path, file in ((self.adapter, "adapter_config.json"), (self.model, "config.json")):
            if (path / file).is_file():
                return path
        return None

    def base_source(self, config: TrainConfig) -> str:
        """What to load as the base: the run's own, where LoftQ changed it; the commit that a hub id with a revision
        was when the run began; else the model's name."""
        changes = config.loftq_iterations > 1 or config.init == "pissa"
        own = changes and self.base.is_dir() and self.exists
        if own or not self.exists or not self.rows_file.is_file():
            return str(self.base) if own else config.model
        return str(self.rows().get("commit") or config.model)

    def refuse_missing(self) -> None:
        """Raises TrainingError, with the nearest run's name, where this is no run's folder."""
        if not self.exists:
            near = [str(path.parent) for path in self.path.parent.glob(f"*/{RunFolder.config_file}")]
            raise TrainingError(
                f"{self} is not a run folder: it has no {RunFolder.config_file}.{did_you_mean(str(self), near)}"
            )

    def finished_config(self) -> TrainConfig:
        """The options of a run that has its result. Raises TrainingError for one that has not."""
        config = self.config()
        if self.result() is None:
            what = RunFolder.model if config.trains_own_weights else RunFolder.adapter
            raise TrainingError(f"{self} has no {what} yet; finish the run: veneer train --resume {self}")
        return config

    def tidy(self) -> None:
        """Delete what killed writes left behind."""
        for folder in (self.path, self.checkpoints):
            if folder.is_dir():
                remove_leftovers(folder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, made where it is missing, against other processes that train into it; what was made for that
        and is still empty afterwards is removed.

        Raises TrainingError where another process holds it.
        """
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            with locked(self.path, wait=False):
                yield
        except BlockingIOError:
            raise TrainingError(
                f"Another process is training into {self}; wait until it ends, or choose another output."
            ) from None
        finally:
            with suppress(OSError):  # one that holds something
                for path in made:
                    path.rmdir()
