"""A run's folder, read while it grows."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.runs.folder import RunFolder
from veneer.runs.history import MetricsTail, RunHistory
from veneer.training.metrics import Metrics, is_written

pytestmark = pytest.mark.unit


def test_a_growing_file_is_read_a_line_at_a_time(tmp_path):
    tail, file = MetricsTail(tmp_path), RunFolder(tmp_path).metrics_file
    assert tail.read() == []
    file.write_text('{"step": 1, "budget": 2}\n{"step": 2, ')
    assert [record["step"] for record in tail.read()] == [1]
    assert tail.rest == b'{"step": 2, '
    with file.open("a") as opened:
        opened.write('"budget": 1}\n')
    assert tail.read() == [{"step": 1, "budget": 2}, {"step": 2, "budget": 1}]
    assert (tail.rest, tail.damaged) == (b"", 0)
    with file.open("a") as opened:
        opened.write('junk\n[1]\n{"step": "3"}\n{"step": 3, "loss": 1.0}\n{"step": 3, "held_out_loss": NaN}\n\n')
    assert len(tail.read()) == 2
    assert tail.damaged == 6
    with file.open("a") as opened:
        opened.write('{"step": 3, "held_out_loss": {"x": 1}}\n{"step": 3, "ranks": 5}\n{"step": true}\n')
    assert len(tail.read()) == 2
    assert tail.damaged == 9


@given(cuts=st.lists(st.integers(0, 10_000)))
def test_wherever_it_was_when_it_was_read_it_is_the_same(cuts, tmp_path_factory):
    whole = "".join(
        json.dumps({"step": step, "held_out_loss": step / 7, "é": "ü"}) + "\n" for step in range(9)
    ).encode()
    folder = tmp_path_factory.mktemp("cut")
    tail = MetricsTail(folder)
    for end in [*sorted(cut % len(whole) for cut in cuts), len(whole)]:
        (RunFolder(folder).metrics_file).open("ab").close()
        with (RunFolder(folder).metrics_file).open("r+b") as file:
            file.write(whole[:end])
        tail.read()
    assert [record["step"] for record in tail.records] == list(range(9))
    assert (tail.rest, tail.damaged) == (b"", 0)


def test_a_resumed_run_is_read_again_from_its_start(tmp_path):
    tail, file = MetricsTail(tmp_path), RunFolder(tmp_path).metrics_file
    file.write_text('{"step": 1, "budget": 2}\n{"step": 2, "budget": 1}\n')
    assert len(tail.read()) == 2
    other = tmp_path / "other"
    other.write_text('{"step": 1, "budget": 2}\n{"step": 2, "budget": 5}\n')
    os.replace(other, file)
    assert tail.read() == [{"step": 1, "budget": 2}, {"step": 2, "budget": 5}]
    file.unlink()
    assert tail.read() == []


def test_a_run_is_in_progress_as_long_as_its_metrics_are_held(run_folder):
    folder = run_folder(12)
    assert not is_written(RunFolder(folder).metrics_file)
    metrics = Metrics(RunFolder(folder).metrics_file, RunFolder(folder).tensorboard, 12)
    assert is_written(RunFolder(folder).metrics_file)
    assert RunHistory.read(folder).phase == "running"
    metrics.close()
    assert not is_written(RunFolder(folder).metrics_file)
    assert RunHistory.read(folder).phase == "stopped"


def test_a_run_that_patience_ended_is_finished(run_folder):
    folder = run_folder(12, patience=2)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    assert RunHistory.read(folder).phase == "stopped"
    saved = folder / "checkpoints" / "step-000012"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"step": 12, "worse": 2}))
    assert RunHistory.read(folder).phase == "finished"


def test_time_is_reckoned_from_the_steps_so_far(run_folder):
    run = RunHistory.read(run_folder(12))
    assert run.seconds() == [0.5, 1.0] * 6  # 100 tokens at 200 and 100 a second
    assert run.seconds_left() == 8 * 0.75
    assert run.tokens_per_second == 150
    assert run.peak_memory == 1_500_000_012


def test_a_finished_run_says_how_many_steps_it_was_to_take(finished_run):
    run = RunHistory.read(finished_run)
    assert (run.phase, run.step, run.total) == ("finished", 100, 100)
    best = run.best()
    assert best is not None
    assert best["held_out_loss"] == min(record["held_out_loss"] for record in run.held_out)
