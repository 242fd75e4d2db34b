"""A run's folder: its names, what it hands out, and who may train into it."""

from __future__ import annotations

import io
import multiprocessing
import subprocess
import sys

import pytest
from rich.console import Console

import veneer
from veneer.errors import TrainingError
from veneer.runs.folder import RunFolder

pytestmark = pytest.mark.unit


def _train(tiny_folder, rows_file, output, **more):
    return veneer.train(
        str(tiny_folder), data=str(rows_file), output=str(output), steps=2, rank=2, batch_size=8, held_out=0,
        console=Console(file=io.StringIO()), **more,
    )  # fmt: skip


def test_names_are_said_once_and_are_paths_of_a_folder(tmp_path):
    assert RunFolder.config_file == "config.yaml"
    assert RunFolder(tmp_path).config_file == tmp_path / "config.yaml"
    assert str(RunFolder("runs/first")) == "runs/first"


def test_it_hands_out_options_rows_metrics_checkpoint_and_result(finished_run):
    run = RunFolder(finished_run)
    assert run.exists
    assert run.config().steps == 100
    assert run.rows()["steps"] == 100
    assert run.metrics()[-1]["step"] == 100
    assert run.latest_checkpoint() == finished_run / "checkpoints" / "step-000100"
    assert run.result() == run.adapter == finished_run / "adapter"
    assert run.finished_config() == run.config()


def test_what_is_no_run_is_refused_with_the_nearest_one(finished_run):
    with pytest.raises(
        TrainingError, match=rf"is not a run folder: it has no config.yaml. Did you mean '{finished_run}'"
    ):
        RunFolder(finished_run.parent / "rum").refuse_missing()


def test_an_unfinished_run_is_refused_with_how_to_finish_it(run_folder):
    folder = run_folder(3)
    with pytest.raises(TrainingError, match=rf"has no adapter yet; finish the run: veneer train --resume {folder}"):
        RunFolder(folder).finished_config()


def _hold(folder, held, done):
    with RunFolder(folder).held():
        held.set()
        done.wait(60)


@pytest.fixture
def another_process(tmp_path):
    """A function that has another process hold a folder, as one that trains into it does."""
    context, started = multiprocessing.get_context("spawn"), []

    def start(folder):
        held, done = context.Event(), context.Event()
        process = context.Process(target=_hold, args=(str(folder), held, done))
        process.start()
        started.append((process, done))
        assert held.wait(60)
        return done

    yield start
    for process, done in started:
        done.set()
        process.join()


def test_two_processes_never_train_into_one_folder(tiny_folder, rows_file, tmp_path, another_process, monkeypatch):
    output = tmp_path / "run"
    another_process(output)
    monkeypatch.setattr("veneer.runs.train.prepare", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(TrainingError, match=r"Another process is training into .*run; wait until it ends, or choose"):
        _train(tiny_folder, rows_file, output)
    assert list(output.iterdir()) == []


def test_a_run_that_is_being_trained_is_not_resumed(tiny_folder, rows_file, tmp_path, another_process):
    result = _train(tiny_folder, rows_file, tmp_path / "run")
    done = another_process(result.folder)
    with pytest.raises(TrainingError, match="Another process is training into"):
        veneer.resume(result.folder, steps=4)
    done.set()


def test_two_commands_at_once_end_in_one_run_and_one_sentence(tiny_folder, rows_file, tmp_path):
    command = [
        sys.executable, "-c", "import sys; sys.argv[0] = 'veneer'; from veneer.cli import main; main()", "train",
        "--model", str(tiny_folder), "--data", str(rows_file), "--output", str(tmp_path / "runs" / "one"),
        "--steps", "30", "--rank", "2", "--held-out", "0",
    ]  # fmt: skip
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [process.communicate() for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], ended
    refused = ended[codes.index(1)][1]
    assert refused.count("\n") == 1
    assert "Another process is training into" in refused or "holds a run already" in refused


def test_a_refusal_leaves_no_folder_that_was_made_for_the_lock(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    for folder in (there / "new" / "deep", there):
        with RunFolder(folder).held():
            assert folder.is_dir()
    assert list(tmp_path.iterdir()) == [there]
    assert list(there.iterdir()) == []
