"""How fast this machine does each kind of operation.

The rates are measured once, in less than a minute, and remembered in the user's cache folder, as frozen/compute.py
does; those of a machine that was busy with other work are used once and forgotten.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import torch

from veneer.errors import ModelError
from veneer.host_load import HostLoad
from veneer.host_memory import resident_memory
from veneer.planning.ledger import KINDS
from veneer.remembered import machine_key, recall, remember

_FILE = "machine.json"
_SECONDS = 57.0  # after which a measurement is ended with what it has by then
_BEFORE = "Measuring this machine once, about a minute."
_AGAIN = "Measuring this machine again, about a minute."
_BUSY = (
    "This machine was busy with other work while it was measured: the rates are used for this plan and not kept, so "
    "the next plan measures it again."
)
_NO_TIME = "This machine was too busy to measure its rates within a minute: this plan predicts no time."


@dataclass(frozen=True)
class Machine:
    """Measured on this machine with torch's threads; without rates no time is predicted."""

    rates: dict[str, float]  # kind of operation → a second's floating-point operations of products, bytes of the others
    operation: float  # seconds that an operation takes beside its arithmetic
    runtime: int  # bytes of a process that trains, without its model and what it makes of it
    loading: int  # of one that has loaded a model

    def beside(self, rows: int) -> Machine:
        """The same where a process has so many bytes for its rows, too."""
        return replace(self, runtime=self.runtime + rows, loading=self.loading + rows)


def measured(*, afresh: bool = False, say: Callable[[str], None] = lambda sentence: None) -> Machine:
    """From the cache file, else (or ``afresh``) measured, in less than a minute, and put there if no other work was in
    its way; a file that cannot be written is no error. ``say`` gets a sentence before it begins, and one where nothing
    is kept."""
    if not afresh and (known := remembered()) is not None:
        return known
    say(_AGAIN if afresh else _BEFORE)
    load = HostLoad()
    machine = _measure()
    if not machine.rates:
        say(_NO_TIME)
    elif load.disturbs(torch.get_num_threads()):
        say(_BUSY)
    else:
        remember(_FILE, _key(), asdict(machine))
    return machine


def remembered() -> Machine | None:
    """What was measured here before, with these versions and threads."""
    try:
        known = Machine(**recall(_FILE, _key()))
    except TypeError:  # nothing, or of another version of this
        return None
    return known if set(KINDS) <= set(known.rates) else None


def _key() -> str:
    made_with = ", ".join(f"{name} {version(name)}" for name in ("transformers", "veneer"))  # the steps are theirs
    return f"{machine_key(torch.__version__, torch.get_num_threads())}, {made_with}"


def _measure(seconds: float = _SECONDS) -> Machine:
    """By a process of its own (runs/measure.py): its memory is a run's, and nothing of this one is in its way. Without
    rates where it has none after so many ``seconds``."""
    with tempfile.TemporaryDirectory() as place:
        printed, errors = _within(seconds, [sys.executable, "-m", "veneer.runs.measure", place])
    if errors is None and not printed:
        return _unmeasured()
    try:
        return Machine(**json.loads(printed.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        raise ModelError(f"This machine's rates could not be measured: {(errors or '')[-500:]}") from None


def _unmeasured() -> Machine:
    """Nothing but the memory that this process has."""
    return Machine({}, 0.0, resident_memory(), resident_memory())


def _within(seconds: float, command: list[str]) -> tuple[str, str | None]:
    """What a program prints, and its errors; None for these where it was ended after so many ``seconds``."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            return process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and with it the processes that it has started
            return process.communicate()[0], None
        except BaseException:  # Ctrl-C, which comes to this process alone
            os.killpg(process.pid, signal.SIGKILL)
            raise
