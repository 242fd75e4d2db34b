"""A resumed run that patience has ended, or whose steps are all taken, says so and how to go on."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from rich.console import Console

import veneer
from veneer.runs.folder import RunFolder

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def ended(tiny_folder, tmp_path_factory):
    """A run that patience ended after step 8 of 16: no later evaluation is better than that of step 4."""
    place = tmp_path_factory.mktemp("ended")
    rows = [{"prompt": f"{a}{b}:", "completion": " yes"} for a in "bcdf" for b in ("at", "ig", "op", "un")]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "held_out.jsonl").write_text('{"prompt": "bat:", "completion": " no"}\n')
    result = veneer.train(
        str(tiny_folder), data=str(place / "rows.jsonl"), held_out=str(place / "held_out.jsonl"), steps=16,
        output=str(place / "run"), learning_rate=1.0, warmup=0, evaluate_every=2, patience=2, rank=4, batch_size=8,
        schedule="constant", console=Console(file=io.StringIO()),
    )  # fmt: skip
    assert (result.best_step, result.steps) == (4, 8)
    return place / "run"


@pytest.fixture
def run(ended, tmp_path):
    return shutil.copytree(ended, tmp_path / "run")


def _resumed(run, **over):
    console = Console(file=io.StringIO(), width=1000)
    return veneer.resume(run, console=console, **over), console.file.getvalue()


def _bytes(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_it_says_that_patience_ended_it_and_how_to_go_on(run, ended):
    result, shown = _resumed(run)
    assert (
        f"Patience ended this run after step 8 of 16: 2 evaluations in a row had no better held-out loss than "
        f"{result.loss_after:.3f} at step 4. To go on: veneer train --resume {run} --patience 4 (0: to the last "
        f"step).\n"
    ) in shown
    assert result.steps == 8
    assert _bytes(run) == _bytes(ended)
    _, again = _resumed(run, patience=1)
    assert "--patience 3 (0: to the last step)" in again


def test_more_patience_goes_on(run):
    result, shown = _resumed(run, patience=4)
    assert "Patience ended" not in shown
    assert result.steps == 12
    result, shown = _resumed(run, patience=0)
    assert result.steps == 16
    assert "All 16 steps" not in shown
    _, shown = _resumed(run)
    assert f"All 16 steps of this run are taken. To go on: veneer train --resume {run} --steps 32\n" in shown


def test_more_steps_start_patience_again(run):
    result, shown = _resumed(run, steps=20)
    assert "Patience had ended this run after step 8; it counts from there again.\n" in shown
    assert result.steps == 12, "two more evaluations"


def test_a_run_killed_after_that_goes_on_as_it_would_have(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "killed")
    _resumed(run, steps=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veneer.runs.train._take_steps", _killed)
        with pytest.raises(RuntimeError, match="killed"):
            _resumed(other, steps=20)
    assert RunFolder(other).config().steps == 20
    result, shown = _resumed(other)
    assert "Patience" not in shown
    assert (result.steps, _bytes(other)) == (12, _bytes(run))


def _killed(*_):
    raise RuntimeError("killed")


def test_epochs_are_what_a_run_of_epochs_is_given(run):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("steps: 16", "steps: null").replace("epochs: auto", "epochs: 4"))
    _, shown = _resumed(run)
    assert f"All 8 steps of this run are taken. To go on: veneer train --resume {run} --epochs 8\n" in shown
