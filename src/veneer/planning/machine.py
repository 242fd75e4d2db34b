"""How fast this machine does each kind of operation.

The rates are measured once, in less than a minute, and remembered in the user's cache folder, as frozen/compute.py
does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version

import torch

from veneer.errors import ModelError
from veneer.planning.ledger import KINDS
from veneer.remembered import machine_key, recall, remember

_FILE = "machine.json"


@dataclass(frozen=True)
class Machine:
    """Measured on this machine with torch's threads; without rates no time is told."""

    rates: dict[str, float]  # kind of operation → a second's floating-point operations of products, bytes of the others
    operation: float  # seconds that an operation takes beside its arithmetic
    runtime: int  # bytes of a process that trains, without its model and what it makes of it
    loading: int  # of one that has loaded a model


def measured(*, afresh: bool = False) -> Machine:
    """From the cache file, else (or ``afresh``) measured and put there; a file that cannot be written is no error."""
    if not afresh and (known := remembered()) is not None:
        return known
    found = _measure()
    remember(_FILE, _key(), asdict(found))
    return found


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


def _measure() -> Machine:
    """By a process of its own (rates.py): its memory is a run's, and nothing of this one is in its way."""
    done = subprocess.run([sys.executable, "-m", "veneer.runs.measure"], capture_output=True, text=True, check=False)
    try:
        return Machine(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        raise ModelError(f"This machine's rates could not be measured: {done.stderr[-500:]}") from None
