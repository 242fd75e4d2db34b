"""A run killed with SIGKILL, at random moments and inside a checkpoint's write, and resumed: the same adapter bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.unit

# Slow steps, so that a kill after a random time falls anywhere; a checkpoint after each, so that it falls in writes.
_TRAIN = """
import io, os, signal, sys, time
from rich.console import Console
import veneer.files
from veneer.runs import train as run
from veneer.training import loop

kill_at_flush = int(sys.argv[4])
flush, flushed = veneer.files._flush, 0
def counted(path):
    global flushed
    flushed += 1
    if flushed == kill_at_flush:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)
veneer.files._flush = counted
step = loop.take_step
loop.take_step = lambda *args: (print("step", flush=True), time.sleep(0.02), step(*args))[-1]

model, data, output = sys.argv[1:4]
quiet = Console(file=io.StringIO())
if os.path.exists(output + "/config.yaml"):
    run.resume(output, console=quiet)
else:
    update = {"lora": {"rank": 2}, "adalora": {"initial_rank": 3, "target_rank": 2, "tinit": 1, "tfinal": 3}}
    run.train(model, data=data, output=output, steps=8, batch_size=4, dropout=0.1, checkpoint_every=1,
              method=sys.argv[6], **update[sys.argv[6]],
              evaluate_every=3, held_out=8, learning_rate=1e-2, optimizer=sys.argv[5],
              optimizer_memory={"adamw": "256MB", "paged-adamw": "1MB"}[sys.argv[5]],
              train_also=["lm_head", "embed_tokens"], compute=sys.argv[7], console=quiet)
"""


def _start(tiny_folder, rows_file, output, optimizer, method, compute, kill_at_flush=0):
    values = (tiny_folder, rows_file, output, kill_at_flush, optimizer, method, compute)
    command = [sys.executable, "-c", _TRAIN, *map(str, values)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.parametrize(
    ("optimizer", "method", "compute"),
    [("adamw", "lora", "fp32"), ("paged-adamw", "adalora", "fp32"), ("adamw", "lora", "bf16")],
)
def test_killed_and_resumed_it_ends_in_the_same_bytes(tiny_folder, rows_file, tmp_path, optimizer, method, compute):
    """The unbroken run has torch's AdamW in either case: where the states lie changes no bit."""
    _finish(_start(tiny_folder, rows_file, tmp_path / "whole", "adamw", method, compute))
    expected = (tmp_path / "whole/adapter/adapter_model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    chance = random.Random(0)

    # At a random moment after a random number of steps.
    process = _start(tiny_folder, rows_file, broken, optimizer, method, compute)
    for _ in range(chance.randint(1, 4)):
        process.stdout.readline()
    time.sleep(chance.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()

    # While a file of a checkpoint is written: it is there under a temporary name only.
    for flush in (chance.randint(3, 8), chance.randint(9, 20)):
        process = _start(tiny_folder, rows_file, broken, optimizer, method, compute, kill_at_flush=flush)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL

    _finish(_start(tiny_folder, rows_file, broken, optimizer, method, compute))
    assert (broken / "adapter/adapter_model.safetensors").read_bytes() == expected
    left = [path.name for path in broken.rglob("*") if path.name.startswith(".veneer-tmp-")]
    assert {path.name for path in broken.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert not left, "what killed writes left behind is tidied away"
