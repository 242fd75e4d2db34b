"""veneer combine: runs and folders, with weights or equal shares."""

from __future__ import annotations

import pytest
import torch

import tiny
import veneer
from veneer.updates.export import plain_updates
from veneer.updates.record import updates_of

pytestmark = pytest.mark.unit


@pytest.fixture
def adapters(tmp_path):
    for name in ("a", "b"):
        model = tiny.build("llama")
        veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]))
        for update in updates_of(model, "default").values():
            torch.nn.init.normal_(update.B)
        veneer.save(model, tmp_path / name)
    return [tmp_path / "a", tmp_path / "b"]


def test_it_writes_one_adapter(adapters, tmp_path, veneer_command):
    outcome = veneer_command(
        "combine", *adapters, tmp_path / "mixed", "--weights=0.7,-0.4", "--how", "svd", "--rank", 1
    )
    assert (outcome.code, outcome.out) == (0, f"Combined adapter written to {tmp_path / 'mixed'}.\n")
    assert {len(one.A) for one in plain_updates(tmp_path / "mixed").values()} == {1}
    assert veneer_command("combine", *adapters, tmp_path / "mean").code == 0
    (first, *_), (second, *_), (mean, *_) = (plain_updates(f).values() for f in (*adapters, tmp_path / "mean"))
    torch.testing.assert_close(mean.B @ mean.A, (first.B @ first.A + second.B @ second.A) / 2)


def test_what_it_refuses(adapters, finished_run, tmp_path, refused):
    assert "There are 3 weights for 2 adapters" in refused("combine", *adapters, tmp_path / "m", "--weights", "1,2,3")
    assert "trains more than low-rank updates" in refused("combine", finished_run, tmp_path / "m")
    assert "weights" in refused("combine", *adapters, tmp_path / "m", "--weights", "1,x")
    assert "exists and is not an empty folder" in refused("combine", *adapters, adapters[0])
