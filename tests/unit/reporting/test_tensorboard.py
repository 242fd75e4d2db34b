"""TensorBoard reads the numbers of a run from its folder."""

from __future__ import annotations

import pytest

from veneer.runs.folder import RunFolder

pytestmark = pytest.mark.unit


def test_tensorboard_reads_what_the_metrics_hold(finished_run):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = reader.EventAccumulator(str(finished_run / "tensorboard"))
    board.Reload()
    records = RunFolder(finished_run).metrics()
    for name in ("loss", "held_out_loss", "learning_rate", "tokens_per_second"):
        expected = [(record["step"], record[name]) for record in records if name in record]
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6), name
