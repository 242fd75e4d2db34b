"""Callbacks get every step and evaluation, after the run's own files have it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import veneer
from veneer.runs.folder import RunFolder

pytestmark = pytest.mark.unit


class _Kept:
    def __init__(self, folder):
        self.folder, self.steps, self.evaluations, self.written = folder, [], [], []

    def on_step(self, record):
        self.steps.append(record)
        self.written.append(RunFolder(self.folder).metrics()[-1]["step"])

    def on_evaluation(self, record):
        self.evaluations.append(record)


@pytest.fixture
def options(tiny_folder, rows_file, tmp_path):
    return {
        "model": str(tiny_folder), "data": str(rows_file), "output": str(tmp_path / "run"), "steps": 4, "rank": 2,
        "batch_size": 8, "held_out": 8, "evaluate_every": 2, "learning_rate": 1e-2,
        "console": Console(file=io.StringIO()),
    }  # fmt: skip


def test_each_step_and_evaluation_is_reported_once_and_after_the_files(options):
    kept = _Kept(options["output"])
    result = veneer.train(**options, callbacks=[kept])
    records = RunFolder(result.folder).metrics()
    assert [(r.step, r.loss, r.tokens) for r in kept.steps] == [
        (record["step"], record["loss"], record["tokens"]) for record in records if "loss" in record
    ]
    assert kept.written == [1, 2, 3, 4]
    assert {record.total for record in kept.steps} == {4}
    assert [(r.step, r.loss) for r in kept.evaluations] == [
        (record["step"], record["held_out_loss"]) for record in records if "held_out_loss" in record
    ]
    assert [record.step for record in kept.evaluations if record.best][-1] == result.best_step


def test_what_a_callback_raises_ends_the_run_which_can_be_resumed(options):
    class Raises(_Kept):
        def on_step(self, record):
            if record.step == 3:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        veneer.train(**options, checkpoint_every=2, callbacks=[Raises(options["output"])])
    kept = _Kept(options["output"])
    result = veneer.resume(options["output"], console=options["console"], callbacks=[kept])
    assert [record.step for record in kept.steps] == [3, 4]
    assert result.steps == 4
