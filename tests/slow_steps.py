"""A run of slow steps in a process of its own, forked from one that has imported everything: killed at any moment."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

import veneer.files
from veneer.runs import train as run
from veneer.training import loop

_UPDATES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "adalora": {"initial_rank": 3, "target_rank": 2, "tinit": 1, "tfinal": 3},
}
_IMPORTED = ["veneer.training.loop", "veneer.runs.train", "transformers.models.llama.modeling_llama"]
_MEMORY = {"adamw": "256MB", "paged-adamw": "1MB"}


class SlowRun:
    """Trains into ``output``, or resumes the run there. ``kill_at_flush``: it kills itself at that file's writing."""

    def __init__(
        self, model: Path, data: Path, output: Path, optimizer: str, method: str, compute: str, kill_at_flush: int = 0
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self._steps, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_train, args=(str(model), str(data), str(output), optimizer, method, compute, kill_at_flush, theirs)
        )
        self._process.start()
        theirs.close()

    def wait_for_step(self) -> None:
        """Return when the next step begins."""
        self._steps.recv()

    def kill(self) -> None:
        self._process.kill()

    def exit_code(self) -> int | None:
        """Wait for its end."""
        self._process.join(120)
        self._steps.close()
        return self._process.exitcode


def _train(
    model: str, data: str, output: str, optimizer: str, method: str, compute: str, kill_at_flush: int, steps: Connection
) -> None:
    """Steps are slow, so that a kill after a random time is at any place; a checkpoint follows each, so that it is in
    writes as well."""
    flush, flushed, step = veneer.files._flush, 0, loop.take_step

    def counted(path: Path) -> None:
        nonlocal flushed
        flushed += 1
        if flushed == kill_at_flush:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    def slow(*arguments: Any) -> Any:
        steps.send("step")
        time.sleep(0.02)
        return step(*arguments)

    veneer.files._flush, loop.take_step = counted, slow
    quiet = Console(file=io.StringIO())
    if (Path(output) / "config.yaml").exists():
        run.resume(output, console=quiet)
    else:
        run.train(
            model, data=data, output=output, steps=8, batch_size=4, dropout=0.1, checkpoint_every=1, method=method,
            **_UPDATES[method], evaluate_every=3, held_out=8, learning_rate=1e-2, optimizer=optimizer,
            optimizer_memory=_MEMORY[optimizer], train_also=["lm_head", "embed_tokens"],
            compute=compute, console=quiet,
        )  # fmt: skip
