"""The kernels against their definitions in Triton's interpreter, which a process has from its first import or not at
all: interpreted/ is run in one of its own. `TRITON_INTERPRET=1 python -m pytest FILE` runs a file there by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
pytestmark = pytest.mark.unit

INTERPRETED = Path(__file__).parent / "interpreted"


def test_every_kernel_is_its_definition():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", str(INTERPRETED)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
