"""Training whose optimizer states exceed a memory control group's limit finishes with pages, and is killed without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

GROUPS = Path("/sys/fs/cgroup/memory")
STATES, LIMIT = 240 * 10**6, 200 * 10**6  # bytes; the gradient takes half of the states' size

# The model is there before its process joins the group: what the group holds are its gradient and the states.
_TRAIN = """
import os, sys
from pathlib import Path
import torch
from veneer.training.paged_adamw import PagedAdamW

which, group, folder, states = sys.argv[1:]
torch.set_num_threads(1)
model = torch.nn.Embedding(int(states) // 8 // 1000, 1000)
tokens = torch.arange(8)
first = torch.nn.Parameter(torch.ones(3))
first.sum().backward()
torch.optim.AdamW([first], fused=True).step()  # the modules that torch imports at its first step stay outside
assert sum(p.numel() for p in model.parameters()) * 8 >= int(states)
Path(group, "cgroup.procs").write_text(str(os.getpid()))
if which == "paged":
    optimizer = PagedAdamW(model.parameters(), folder=folder, resident="16MB")
else:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for _ in range(3):
    optimizer.zero_grad()
    model(tokens).square().mean().backward()
    optimizer.step()
    print("step", flush=True)
"""


@pytest.fixture
def group():
    """A memory group with the limit, for memory and swap together."""
    made = GROUPS / f"veneer-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / "memory.limit_in_bytes").write_text(str(LIMIT))
        swap = made / "memory.memsw.limit_in_bytes"
        if swap.exists():
            swap.write_text(str(LIMIT))
    except OSError as error:
        pytest.skip(f"no memory control group (version 1) can be made here: {error}")
    yield made
    made.rmdir()


def test_states_larger_than_the_memory_train_with_pages_and_are_killed_without(group, tmp_path):
    assert STATES > LIMIT

    def train(which):
        command = [sys.executable, "-c", _TRAIN, which, str(group), str(tmp_path), str(STATES)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    paged = train("paged")
    assert paged.returncode == 0, paged.stderr
    assert paged.stdout.count("step") == 3
    unpaged = train("torch")
    assert (unpaged.returncode, unpaged.stdout) == (-signal.SIGKILL, ""), unpaged.stderr
