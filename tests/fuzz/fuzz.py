"""Damaged files of every kind, read as Veneer reads them: each is read, or refused in a sentence.

    make fuzz                        10,000 cases
    python tests/fuzz/fuzz.py 500    so many, of all kinds in turn
    python tests/fuzz/fuzz.py 500 gguf        … of one kind
    python tests/fuzz/fuzz.py gguf:17         one case again, with its traceback

A case is its kind and its number, which seeds it. Bad is: a traceback (any exception but a VeneerError or an OSError,
which the command line prints as a sentence), a wrong result, a hang, more than 2 GB of memory, the end of the process,
and a message that repeats its input at length.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__" or multiprocessing.parent_process() is not None:  # not where tests import it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.kinds import KINDS
from fuzz.mutations import mutations_of
from veneer.errors import VeneerError

SECONDS, MEMORY, LONGEST = 20, 2 * 2**30, 1500
BAD = ("traceback", "wrong", "hang", "memory", "ended", "long")


class Hang(BaseException):
    """Raised by the alarm; no handler of ours or a library's takes it for an error of the file."""


def base_of(kind: str, folder: Path) -> Path:
    """Where the undamaged files are, made once for all kinds that are made alike."""
    return folder / KINDS[kind].make.__name__


def damaged(kind: str, number: int, base: Path, copy: Path) -> str:
    """Copy what the kind reads and damage one of its files; what was done, for a person."""
    shutil.copytree(base, copy, symlinks=True)
    rng = random.Random(f"{kind} {number}")
    files = sorted({file for pattern in KINDS[kind].files for file in copy.glob(pattern) if file.is_file()})
    file = rng.choice(files)
    if rng.random() < 0.03:
        file.unlink()
        return f"{file.name} deleted"
    mutation = rng.choice(mutations_of(file))
    file.write_bytes(mutation(file.read_bytes(), rng))
    return f"{file.name} {mutation.__name__.strip('_')}"


def outcome(kind: str, number: int, base: Path, room: Path, *, loud: bool = False) -> tuple[str, str]:
    """ "read", "refused" or one of BAD, and what happened."""
    copy = room / "case"
    shutil.rmtree(copy, ignore_errors=True)
    done = damaged(kind, number, base, copy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS)
    try:
        KINDS[kind].read(copy)
        result = "read", done
    except (VeneerError, OSError) as error:
        long = isinstance(error, VeneerError) and len(str(error)) > LONGEST
        result = ("long" if long else "refused"), f"{done}: {error}"
        if loud:
            print(error)
    except AssertionError as error:
        result = "wrong", f"{done}: {error}"
    except Hang:
        result = "hang", done
    except MemoryError:
        result = "memory", done
    except Exception as error:
        if loud:
            traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        result = "traceback", f"{done}: {type(error).__name__} {str(error)[:150]!r} at {last.filename}:{last.lineno}"
    finally:
        signal.alarm(0)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before > MEMORY:
        return "memory", result[1]
    return result


def _hang(*_: object) -> None:
    raise Hang


class Reader:
    """A process of its own that reads cases, and may end at any of them: then the next case starts another.

    It is spawned, not forked: a fork does not copy OpenMP's threads, and a product in the child would wait for them.
    """

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None

    def make(self, kind: str, base: Path) -> None:
        if (made := self._ask("make", kind, base, seconds=120)) is not None:
            raise RuntimeError(f"{kind}: {made}")

    def read(self, kind: str, number: int, base: Path) -> tuple[str, str]:
        """As `outcome`."""
        found: tuple[str, str] = self._ask("read", kind, number, base, seconds=SECONDS + 10)
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _ask(self, *question: Any, seconds: float) -> Any:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_answer, args=(other,), daemon=True)
            self._process.start()
            other.close()
            seconds += 60  # its imports
        self._pipe.send(question)
        # The alarm inside cannot end a hang in C++ code; the end of this wait does.
        if not self._pipe.poll(seconds):
            self.close()
            return "hang", "neither an answer nor an alarm"
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._process = None
            return "ended", f"the process ended with {code}"


def _answer(pipe: Any) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with tempfile.TemporaryDirectory() as room:
        while True:
            verb, *about = pipe.recv()
            if verb == "make":
                kind, base = about
                base.mkdir(parents=True)
                pipe.send(KINDS[kind].make(base))
            else:
                pipe.send(outcome(*about, Path(room)))


def fuzz(
    count: int, kinds: Iterable[str], folder: Path, reader: Reader, *, first: int = 0
) -> dict[str, list[tuple[int, str, str]]]:
    """Kind → outcomes; ``count`` cases of all kinds together."""
    kinds = list(kinds)
    found: dict[str, list[tuple[int, str, str]]] = {}
    for place, kind in enumerate(kinds):
        base = base_of(kind, folder)
        if not base.exists():
            reader.make(kind, base)
        share = count // len(kinds) + (place < count % len(kinds))
        found[kind] = [(number, *reader.read(kind, number, base)) for number in range(first, first + share)]
    return found


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        if arguments and ":" in arguments[0]:
            kind, _, number = arguments[0].partition(":")
            base = Path(folder) / "base"
            base.mkdir()
            KINDS[kind].make(base)
            print(outcome(kind, int(number), base, Path(folder), loud=True))
            return 0
        count = int(arguments[0]) if arguments else 10_000
        reader = Reader()
        found = fuzz(count, arguments[1:] or KINDS, Path(folder), reader)
        reader.close()
    print(f"| {'kind':16} | cases | read | refused | {' | '.join(BAD)} |")
    bad = 0
    for kind, outcomes in found.items():
        counts = Counter(result for _, result, _ in outcomes)
        bad += sum(counts[name] for name in BAD)
        numbers = " | ".join(str(counts[name]) for name in ("read", "refused", *BAD))
        print(f"| {kind:16} | {len(outcomes)} | {numbers} |")
    for kind, outcomes in found.items():
        for number, result, said in outcomes:
            if result in BAD:
                print(f"{kind}:{number} {result}: {said[:400]}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
