"""A run killed with SIGKILL, at random moments and inside a checkpoint's write, and resumed: the same adapter bytes."""

from __future__ import annotations

import random
import signal
import time
from functools import partial

import pytest

from slow_steps import SlowRun

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("optimizer", "method", "compute"),
    [("adamw", "lora", "fp32"), ("paged-adamw", "adalora", "fp32"), ("adamw", "lora", "bf16")],
)
def test_killed_and_resumed_it_ends_in_the_same_bytes(tiny_folder, rows_file, tmp_path, optimizer, method, compute):
    """The unbroken run has torch's AdamW in either case: where the states lie changes no bit."""
    run = partial(SlowRun, tiny_folder, rows_file)
    assert run(tmp_path / "whole", "adamw", method, compute).exit_code() == 0
    expected = (tmp_path / "whole/adapter/adapter_model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    chance = random.Random(0)

    # At a random moment after a random number of steps.
    process = run(broken, optimizer, method, compute)
    for _ in range(chance.randint(1, 4)):
        process.wait_for_step()
    time.sleep(chance.uniform(0, 0.05))
    process.kill()
    assert process.exit_code() == -signal.SIGKILL

    # While a file of a checkpoint is written: it is there under a temporary name only.
    for flush in (chance.randint(3, 8), chance.randint(9, 20)):
        assert run(broken, optimizer, method, compute, kill_at_flush=flush).exit_code() == -signal.SIGKILL

    assert run(broken, optimizer, method, compute).exit_code() == 0
    assert (broken / "adapter/adapter_model.safetensors").read_bytes() == expected
    left = [path.name for path in broken.rglob("*") if path.name.startswith(".veneer-tmp-")]
    assert {path.name for path in broken.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert not left, "what killed writes left behind is tidied away"
