"""What would stop a run after hours, looked for before it starts: the run folder and the disk under it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from veneer.errors import ModelError, TrainingError
from veneer.runs.folder import RunFolder
from veneer.units import compared

_SLACK = 16 * 2**20  # configs, metrics, TensorBoard


def check_new_run(folder: RunFolder) -> None:
    """Raises TrainingError when ``folder`` holds something already."""
    if folder.config_file.exists():
        last = folder.latest_checkpoint()
        at = f" (checkpoint at step {int(last.name.removeprefix('step-'))})" if last else ""
        raise TrainingError(
            f"{folder} holds a run already{at}; go on with it by: veneer train --resume {folder}, or choose another "
            f"output."
        )
    folder.tidy()
    left = {  # by a killed start
        *(RunFolder.checkpoints, RunFolder.base, RunFolder.start, RunFolder.data_file, RunFolder.held_out_file),
        *(RunFolder.template_file, RunFolder.reference_file),
    }
    if any(path.name not in left for path in folder.path.iterdir()):
        raise TrainingError(f"{folder} is not empty and holds no run; choose a new folder as output.")


def check_writable(folder: Path) -> None:
    """Raises TrainingError when ``folder`` is a file, or no file can be made in it."""
    if folder.is_file():
        raise TrainingError(f"The output {folder} is a file; a run needs a folder.")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    probe = there / f".veneer-probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise TrainingError(f"Nothing can be written to {there}: {error.strerror}.") from None


def check_disk(
    folder: Path, parameters: int, keep_checkpoints: int, states: int, paged: bool = False, allocating: bool = False,
    model_bytes: int = 0,
) -> None:  # fmt: skip
    """Raises TrainingError when the disk cannot hold the run's files.

    A checkpoint holds each trained parameter in fp32 and the ``states``, AdamW's moments, of so many bytes; one more is
    being written while the kept ones stand; the best and the final adapter come on top, each beside the one it
    replaces. ``paged``: the states are on this disk as well while the run goes on. ``allocating``: AdaLoRA's
    importance, two numbers for each parameter, is in the checkpoints as well. ``model_bytes``: of a model that is the
    result instead of an adapter.
    """
    weights = 4 * parameters
    checkpoint = (3 if allocating else 1) * weights + states
    needed = (keep_checkpoints + 1) * checkpoint + 4 * weights + paged * states + model_bytes + _SLACK
    free = shutil.disk_usage(folder).free
    if free < needed:
        has, writes = compared(free, needed)
        raise TrainingError(
            f"The disk of {folder} has {has} free, but the run will write {writes}; free some, lower keep_checkpoints "
            f"or rank, or choose another output."
        )


def refuse_taken(out: Path) -> None:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not an empty folder; choose a new one.")
    check_writable(out)
