"""The rows that are predicted so far, in a file beside the output, so that an interrupted prediction goes on.

OUTPUT.partial is JSON lines: what is predicted, by what and how, as digests; then a line a row, with the row's number.
A line that a kill cut off is dropped. The file goes when the output is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from veneer.errors import DataError
from veneer.files import errors_of
from veneer.prediction.result import Prediction
from veneer.unix import fcntl

# What a part of the identity is called in a refusal.
_CALLED = {"model": "another model or adapter", "rows": "other rows", "options": "other options"}


class Partial:
    """``done``: row number → prediction; `add` keeps more of them."""

    def __init__(self, file: IO[str], done: dict[int, Prediction]) -> None:
        self._file, self.done = file, done

    def add(self, predicted: Iterable[tuple[int, Prediction]]) -> None:
        for row, prediction in predicted:
            self.done[row] = prediction
            fields: dict[str, Any] = {"row": row, "text": prediction.text, "probabilities": prediction.probabilities}
            fields |= {} if prediction.labels is None else {"labels": prediction.labels}
            fields |= {} if prediction.number is None else {"number": prediction.number}
            self._file.write(json.dumps(fields, ensure_ascii=False) + "\n")
        self._file.flush()


def partial_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


@contextmanager
def partial(output: Path, identity: dict[str, Any], *, overwrite: bool) -> Iterator[Partial]:
    """What there is of ``output`` so far, held against other processes, until `delete_partial` deletes it.

    ``identity``: model, rows and options, as digests and values. Raises DataError for what is of another identity,
    which ``overwrite`` drops, and where another process goes on with it.
    """
    path = partial_file(output)
    with errors_of(path), path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"Another process is predicting into {output}; wait until it ends.") from None
        except OSError:  # a file system without locks
            pass
        done = _read(file, path, identity, overwrite)
        if done is None:
            file.truncate(0)
            file.write(json.dumps(identity, ensure_ascii=False) + "\n")
            file.flush()
        yield Partial(file, done or {})


def delete_partial(output: Path) -> None:
    """Delete what the output holds now."""
    partial_file(output).unlink(missing_ok=True)


def _read(file: IO[str], path: Path, identity: dict[str, Any], overwrite: bool) -> dict[int, Prediction] | None:
    """The rows of the file, cut off after its last whole line; None where it is empty or dropped."""
    file.seek(0)
    whole, _, cut = file.read().rpartition("\n")
    if not whole:
        return None
    lines = whole.split("\n")
    try:
        known, *rows = [json.loads(line) for line in lines]
        done = {row["row"]: _prediction(row) for row in rows}
        differing = [part for part in identity if known.get(part) != identity[part]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is damaged; delete it, and the prediction starts from its first row.") from None
    if differing and overwrite:
        return None
    if differing:
        raise DataError(
            f"{path} holds {len(done)} rows that were predicted with {_differs(known, identity, differing)}; give "
            f"--overwrite to start from the first row, or choose another output."
        )
    if cut:
        file.truncate(len((whole + "\n").encode()))
    return done


def _prediction(row: dict[str, Any]) -> Prediction:
    labels = row.get("labels")
    return Prediction(row["text"], row["probabilities"], None if labels is None else tuple(labels), row.get("number"))


def _differs(known: dict[str, Any], identity: dict[str, Any], differing: list[str]) -> str:
    called = [_CALLED.get(part, part) for part in differing if part != "options"]
    if "options" in differing:
        before, now = known.get("options") or {}, identity["options"]
        called += [f"{name} = {before.get(name)}, not {now[name]}" for name in now if before.get(name) != now[name]]
    return " and ".join(called or [_CALLED["options"]])
