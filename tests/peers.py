"""Programs of others that tests ask: in the environment that make bench makes for them, build/peers, or in this one."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
_PYTHONS = (ROOT / "build" / "peers" / "bin" / "python", Path(sys.executable))


@functools.cache
def python_with(module: str) -> str | None:
    """The Python that has a module installed; None where neither has."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    found = (str(python) for python in _PYTHONS if python.exists())
    return next((python for python in found if subprocess.run([python, "-c", code]).returncode == 0), None)


def ask(module: str, script: str, *arguments: object) -> Any:
    """What a script of tests/peer_scripts prints as JSON in its last line; the test is skipped where nobody has
    ``module``."""
    python = python_with(module)
    if python is None:
        pytest.skip(f"{module} is not installed; make build/peers/ready installs it")
    file = Path(__file__).with_name("peer_scripts") / script
    done = subprocess.run(
        [python, str(file), *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
