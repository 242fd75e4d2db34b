"""The loop asks a run's world for its micro-batches, for sums, and who writes."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import pytest
import torch

import tiny
import veneer
from veneer.data.labels import Tokens
from veneer.training import loop
from veneer.training.automatic import Size, automatic
from veneer.training.config import RunConfig, TrainConfig
from veneer.training.loss import Loss
from veneer.training.own_weights import trained_tensors
from veneer.training.state import State
from veneer.training.world import OneProcess

pytestmark = pytest.mark.unit

ROWS = [
    Tokens([number + place for place in range(5)], [number + place for place in range(5)], "") for number in range(4)
]


def test_one_process_is_a_world_of_its_own():
    world, value = OneProcess(), torch.ones(2)
    world.sum([value])
    assert (world.rank, world.size, world.writes) == (0, 1, True)
    assert world.mine([1, 2, 3]) == [1, 2, 3]
    assert value.tolist() == [1, 1]


class _OfTwo:
    """One of two processes, here threads; a sum adds what both gave, in the order of their ranks."""

    size = 2

    def __init__(self, rank, barrier, given):
        self.rank, self.writes, self._barrier, self._given = rank, rank == 0, barrier, given

    def mine(self, parts):
        half = len(parts) // 2
        return parts[self.rank * half : (self.rank + 1) * half]

    def sum(self, tensors):
        self._given[self.rank] = [tensor.clone() for tensor in tensors]
        self._barrier.wait()
        for place, tensor in enumerate(tensors):
            tensor.copy_(self._given[0][place] + self._given[1][place])
        self._barrier.wait()


def _run(model, world, **parts):
    asked = TrainConfig(model="m", data="d", output="o", batch_size=4, micro_batch_size=1)
    config = RunConfig.of(asked, automatic(asked, Size(64, 1, 0)))
    optimizer = torch.optim.AdamW([p for p in trained_tensors(model).values() if p.requires_grad], 1e-2)
    names = ("folder", "checkpoints", "best", "batches", "held_out", "metrics", "stop")
    parts = {**dict.fromkeys(names), "total": 1, **parts}
    loss = Loss(model, 0, ROWS[0], kind="causal")
    return loop.Run(config=config, model=model, loss=loss, optimizer=optimizer, world=world, **parts)


def test_two_processes_take_the_step_of_one():
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=2))
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    barrier, given = threading.Barrier(2, timeout=60), {}
    whole, *both = (
        _run(m, w) for m, w in zip(models, [OneProcess(), *(_OfTwo(r, barrier, given) for r in (0, 1))], strict=True)
    )
    taken = [loop.take_step(whole, ROWS, 1e-2), None, None]

    def step(place):
        taken[place + 1] = loop.take_step(both[place], ROWS, 1e-2)

    threads = [threading.Thread(target=step, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken[1] == taken[2], "all processes know the same loss and norm"
    assert taken[1] == pytest.approx(taken[0])
    one, first, second = map(trained_tensors, models)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, one[name])


def test_one_process_of_a_world_writes(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda *parts: saved.append("checkpoint"))
    monkeypatch.setattr(loop, "save_best", lambda *parts: saved.append("best"))
    monkeypatch.setattr(_OfTwo, "sum", lambda self, tensors: None)
    for rank, expected in ((1, []), (0, ["best", "checkpoint"])):
        model = tiny.build("llama")
        veneer.attach(model, veneer.LoRA(rank=2))
        given = {
            "batches": SimpleNamespace(rows=lambda step: ROWS), "held_out": ROWS, "stop": SimpleNamespace(asked=False),
            "metrics": SimpleNamespace(write=lambda **record: None),
        }  # fmt: skip
        loop.train_loop(_run(model, _OfTwo(rank, None, {}), **given), State())
        assert saved == expected
