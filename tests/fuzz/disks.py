"""Every verb that writes, onto a disk that fills up on the way; and again, when there is room.

    make disks                     200 full disks
    python tests/fuzz/disks.py 40

Needs root, to mount a disk. Bad is: anything but one sentence that names what could not be written; a file that was
there and is not as it was; a temporary file that stays; and other bytes than on a large disk, once there is room.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console

import veneer
from fuzz.kinds import make_model, make_rows
from veneer.commands.combine import combine_to
from veneer.commands.export import export_to
from veneer.commands.merge import merge_to
from veneer.commands.quantize import quantise_to
from veneer.errors import VeneerError
from veneer.files import TEMPORARY
from veneer.runs import begin

QUIET = Console(file=io.StringIO())
DISK = 16 * 2**20  # bytes
BAD = ("traceback", "no sentence", "lost", "left behind", "not again", "other bytes")
_TRAINED: dict[str, Any] = {
    "steps": 4, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 2, "held_out": 8, "learning_rate": 1e-2,
}  # fmt: skip


class Verb(NamedTuple):
    """``write`` is given a folder with model, rows and a run, and the path ``out`` to write to; ``kept`` is what stays
    of a failure, since the next call goes on from it."""

    out: str
    write: Callable[[Path, Path], Any]
    kept: str = ""


def _training(**options: Any) -> Verb:
    def write(room: Path, out: Path) -> None:
        # What would refuse a disk without room before the first step is not asked.
        with patch.object(begin, "check_disk", lambda *args, **how: None):
            if (out / "config.yaml").exists():
                veneer.resume(out, console=QUIET)
            else:
                data = {"data": str(room / "rows.jsonl"), "output": str(out), "console": QUIET}
                veneer.train(str(room / "model"), **data, **_TRAINED, **options)

    return Verb("run", write, "run")


def _predicting(out: str) -> Verb:
    def write(room: Path, out: Path) -> None:
        data = {"data": str(room / "asked.jsonl"), "console": QUIET}
        veneer.predict(str(room / "run"), **data, output=str(out))

    return Verb(out, write, f"{out}.partial")


VERBS = {
    "train": _training(rank=2),
    "train a whole model": _training(method="full"),
    "train with the paged optimizer": _training(rank=2, optimizer="paged-adamw", optimizer_memory="1MB"),
    "merge": Verb("merged", lambda room, out: merge_to(room / "run", out)),
    "merge to nf4": Verb("merged", lambda room, out: merge_to(room / "run", out, storage="nf4")),
    "merge to GGUF": Verb("merged.gguf", lambda room, out: merge_to(room / "run", out, format="gguf")),
    "quantize": Verb("codes", lambda room, out: quantise_to(room / "model", out)),
    "export": Verb("plain", lambda room, out: export_to(room / "run", out)),
    "export to GGUF": Verb("adapter.gguf", lambda room, out: export_to(room / "run", out, format="gguf")),
    "export for mlx-lm": Verb("mlx", lambda room, out: export_to(room / "run", out, format="mlx")),
    "combine": Verb("mixed", lambda room, out: combine_to([room / "run", room / "run"], out)),
    "predict to JSON lines": _predicting("out.jsonl"),
    "predict to Parquet": _predicting("out.parquet"),
}


def make(room: Path) -> None:
    """What the verbs read."""
    make_model(room / "model")
    make_rows(room)
    lines = (room / "rows.jsonl").read_text().splitlines()
    (room / "asked.jsonl").write_text("".join(f"{line}\n" for line in lines * 8))
    _training(rank=2).write(room, room / "run")


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A disk of its own. Raises PermissionError where none can be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        raise PermissionError("only root can mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def outcome(verb: Verb, room: Path, disk: Path, free: int, expected: str) -> tuple[str, str]:
    """ "right", "fits" where nothing failed, or one of BAD, and what happened; ``free``: bytes left on the disk."""
    _clear(disk)
    before, ballast, out = disk / "before.txt", disk / "ballast", disk / verb.out
    before.write_text("mine")
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - free))
    said = _failure(verb, room, out)
    if said is None:
        return "fits", ""
    if said.startswith("traceback") or str(out) not in said or TEMPORARY in said:
        return ("traceback" if said.startswith("traceback") else "no sentence"), said
    if before.read_text() != "mine":
        return "lost", said
    if left := [path.name for path in disk.rglob("*") if path.name.startswith(TEMPORARY)]:
        return "left behind", str(left)
    if others := {path.name for path in disk.iterdir()} - {"before.txt", "ballast", verb.kept}:
        return "left behind", str(others)
    ballast.unlink()
    again = _failure(verb, room, out)
    if again is not None:
        return "not again", f"{said} Then: {again}"
    return ("right" if digest(out) == expected else "other bytes"), said


def _failure(verb: Verb, room: Path, out: Path) -> str | None:
    """The sentence that a person sees, or "traceback" and what of it."""
    in_threads: list[str] = []
    with patch.object(threading, "excepthook", lambda what: in_threads.append(f"traceback in a thread: {what!r}")):
        try:
            verb.write(room, out)
        except VeneerError as error:
            return str(error)
        except OSError as error:
            return f"{error.filename2 or error.filename}: {error.strerror}"  # as the command line says it
        except Exception as error:
            return f"traceback: {type(error).__name__} {error}"
    return in_threads[0] if in_threads else None


def _clear(disk: Path) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def digest(out: Path) -> str:
    """Of a file, of a folder's files, or of a run's weights."""
    weights = [part for part in (out / "adapter", out / "model") if (out / "config.yaml").exists() and part.is_dir()]
    files = [out] if out.is_file() else sorted((weights[0] if weights else out).rglob("*"))
    made = hashlib.sha256()
    for file in files:
        if file.is_file():
            made.update(file.name.encode() + file.read_bytes())
    return made.hexdigest()


def outcomes(names: list[str], count: int, room: Path, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Of each verb, ``count`` disks that are full on the way."""
    found: dict[str, list[tuple[str, str]]] = {}
    make(room)
    with mounted(room / "disk") as disk:
        for name in names:
            verb, chance = VERBS[name], random.Random(f"{name} {seed}")
            _clear(disk)
            free = shutil.disk_usage(disk).free
            verb.write(room, disk / verb.out)
            taken, expected = free - shutil.disk_usage(disk).free, digest(disk / verb.out)
            found[name] = []
            for _ in range(5 * count):
                result = outcome(verb, room, disk, chance.randrange(taken), expected)
                if result[0] != "fits":
                    found[name].append(result)
                if len(found[name]) == count:
                    break
    return found


def main(arguments: list[str]) -> int:
    count = int(arguments[0]) if arguments else 200
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        found = outcomes(arguments[1:] or list(VERBS), -(-count // len(VERBS)), Path(folder))
    print(f"| verb | full disks | right | {' | '.join(BAD)} |")
    print("|---" * (3 + len(BAD)) + "|")
    bad = 0
    for name, results in found.items():
        said = Counter(result for result, _ in results)
        bad += sum(said[name] for name in BAD)
        print(f"| {name} | {len(results)} | {' | '.join(str(said[each]) for each in ('right', *BAD))} |")
    for name, results in found.items():
        for result, what in results:
            if result in BAD:
                print(f"{name} {result}: {what[:500]}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
