"""Training and quantising on a device other than the CPU, pretended in Python: tests/pretended/checks.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

import tiny
import veneer

pytestmark = pytest.mark.unit
CHECKS = Path(__file__).parent.parent / "pretended" / "checks.py"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made of Python",
)
def test_the_pretended_device_does_what_the_cpu_does():
    """In a process of its own, since torch keeps such a device for as long as the process lives."""
    command = [sys.executable, "-m", "pytest", str(CHECKS), "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, env=outside, cwd=CHECKS.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("update", [veneer.LoRA(rank=2), veneer.LoRA(rank=2, dora=True)])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_an_adapted_model_has_shapes_on_meta(update, compute):
    model = veneer.attach(tiny.build("llama"), update).to("meta")
    if compute:
        model.to(compute)
    ids = torch.ones(2, 5, dtype=torch.long, device="meta")
    assert model(input_ids=ids).logits.shape == (2, 5, tiny.VOCABULARY)
