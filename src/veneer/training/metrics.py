"""What a run measured: a line of metrics.jsonl for each step and evaluation, and TensorBoard when it is installed."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from veneer.documents import parsed_json
from veneer.errors import TrainingError
from veneer.files import write_text
from veneer.unix import fcntl

OF_A_STEP = ("loss", "learning_rate", "gradient_norm", "tokens", "tokens_per_second", "peak_memory")
_NUMBERS = (
    *OF_A_STEP, "step", "held_out_loss", "held_out_perplexity", "held_out_accuracy", "held_out_reward_accuracy",
    "held_out_reward_margin",
)  # fmt: skip
_BY_NAME = ("ranks", "importance", "held_out_metrics")


class Metrics:
    """Appends records to a run's metrics; a resumed run first drops those of steps that it takes again."""

    def __init__(self, file: Path, board: Path, step: int) -> None:
        """``file``: metrics.jsonl; ``board``: TensorBoard's folder; ``step``: the last one that is done."""
        self._path = file
        kept = [record for record in read_metrics(file) if step and record["step"] <= step]  # step 0 is measured again
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a", encoding="utf-8")
        with suppress(OSError):  # a file system without locks: then `is_written` cannot know
            fcntl.flock(self._file, fcntl.LOCK_SH)
        self._at = board, step + 1

    @cached_property
    def _board(self) -> Any:
        """Opened with the first record: until its import is done no step would begin."""
        return _tensorboard(*self._at)

    def write(self, **record: Any) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name == "held_out_metrics":
                    for metric, number in value.items():
                        self._board.add_scalar(f"held_out_{metric}", number, record["step"])
                elif name != "step" and not isinstance(value, dict):
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        board = self.__dict__.get("_board")
        if board is not None:
            board.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a kill cut short is not one.

    Raises TrainingError for a line that is damaged.
    """
    records: list[dict[str, Any]] = []
    *lines, cut = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    for number, line in enumerate([*lines, *([cut] if cut else [])], 1):
        try:
            record = parsed_json(line)
            if not is_record(record) or type(record["step"]) is not int:
                raise ValueError("it is no record of a step")
        except ValueError as error:
            if line is cut:
                break
            raise TrainingError(f"{file}:{number} is damaged ({error}); delete the line to go on without it.") from None
        records.append(record)
    return records


def is_record(value: Any) -> bool:
    """Whether a line's value is the record of a step or an evaluation: numbers, and numbers by name."""
    return (
        isinstance(value, dict)
        and "step" in value
        and all(_is_number(value[name]) for name in _NUMBERS if name in value)
        and all(isinstance(value[name], dict) for name in _BY_NAME if name in value)
        and all(_is_number(number) for name in _BY_NAME for number in value.get(name, {}).values())
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_written(file: Path) -> bool:
    """Whether a process is training the run of this metrics.jsonl. It holds a lock on the file, which the system takes
    back from a process that ends, however it ends."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _tensorboard(folder: Path, first_step: int) -> Any:
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)
