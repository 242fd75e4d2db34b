"""Metrics of a run and its evaluation, and the best adapter and patience by them."""

from __future__ import annotations

import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

import veneer
from veneer.errors import ConfigError, DataError, TrainingError
from veneer.reporting.run_page import run_page
from veneer.runs.folder import RunFolder
from veneer.training.config import TrainConfig
from veneer.training.loop import _is_better
from veneer.training.state import State

pytestmark = pytest.mark.unit

QUIET = Console(file=io.StringIO())


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of metrics in the working folder: one that is as high as the run is short, one to be low."""
    (tmp_path / "own_of_runs.py").write_text(
        "calls = []\n"
        "def early(prediction, row):\n    calls.append(row['where'])\n    return -len(calls)\n"
        "def length(prediction, row):\n    return len(prediction)\n"
        "length.higher_is_better = False\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "own_of_runs"
    sys.modules.pop("own_of_runs", None)


def train(model, rows, folder, **options):
    console = Console(file=io.StringIO(), width=500)
    given = {
        "data": str(rows), "output": str(folder), "steps": 12, "rank": 4, "batch_size": 8, "learning_rate": 1e-2,
        "checkpoint_every": 4, "evaluate_every": 4, "held_out": 8, "dropout": 0.1,
    }  # fmt: skip
    return veneer.train(str(model), console=console, **{**given, **options}), console.file.getvalue()


def _evaluations(folder):
    return [record for record in RunFolder(folder).metrics() if "held_out_loss" in record]


def test_a_run_measures_its_metrics_and_evaluate_finds_the_same(tiny_folder, rows_file, own, tmp_path):
    result, shown = train(
        tiny_folder, rows_file, tmp_path / "run", metrics=["exact", f"{own}:length"], steps=24, evaluate_every=8
    )
    assert f"Measured on 8 held-out rows, each answered: exact (higher is better), {own}:length (lower is b" in shown
    records = _evaluations(result.folder)
    assert [set(record["held_out_metrics"]) for record in records] == [{"exact", f"{own}:length"}] * 4
    kept = next(record for record in records if record["step"] == result.best_step)
    found = veneer.evaluate(result.folder, metrics=["exact", f"{own}:length"], examples=0)
    assert found.adapter.metrics == kept["held_out_metrics"]
    assert found.base.metrics == records[0]["held_out_metrics"]
    assert found.lower_is_better == [f"{own}:length"]
    assert f"{own}:length (lower is better)" in repr(found)
    written = json.loads((result.folder / "evaluation.json").read_text())
    assert written["adapter"]["metrics"] == found.adapter.metrics
    page = run_page(result.folder)
    assert f"{own}:length (lower is better)" in page
    assert "Held-out exact" in page


def test_the_best_adapter_and_patience_follow_the_metric(tiny_folder, rows_file, own, tmp_path):
    result, shown = train(tiny_folder, rows_file, tmp_path / "run", best_by=f"{own}:early", patience=2, steps=40)
    assert f"The adapter with the highest {own}:early is kept; of equal ones that with the lowest loss." in shown
    assert (result.best_step, result.steps) == (4, 12)  # the first is the best, and two after it are not better
    assert RunFolder(result.folder).config().best_by == f"{own}:early"
    kept = next(record for record in _evaluations(result.folder) if record["step"] == 4)
    assert result.loss_after == kept["held_out_loss"]
    again = io.StringIO()
    veneer.resume(result.folder, console=Console(file=again, width=500))
    assert f"had no better held-out {own}:early than" in again.getvalue()


def test_by_accuracy(tiny_folder, rows_file, tmp_path):
    result, _ = train(tiny_folder, rows_file, tmp_path / "run", best_by="accuracy", steps=24)
    records = [record for record in _evaluations(result.folder) if record["step"]]
    best = max(records, key=lambda record: (record["held_out_accuracy"], -record["held_out_loss"]))
    assert result.best_step == best["step"]
    assert result.accuracy == best["held_out_accuracy"]


def test_a_resumed_run_keeps_what_decides_and_ends_in_the_same_bytes(tiny_folder, rows_file, own, tmp_path):
    how = {"best_by": f"{own}:length", "schedule": "constant", "warmup": 0}
    whole, _ = train(tiny_folder, rows_file, tmp_path / "whole", **how)
    train(tiny_folder, rows_file, tmp_path / "half", steps=8, **how)
    resumed = veneer.resume(tmp_path / "half", steps=12, console=QUIET)
    assert resumed.best_step == whole.best_step
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-000012/adapter/adapter_model.safetensors"):
        assert (whole.folder / name).read_bytes() == (tmp_path / "half" / name).read_bytes()
    states = [
        json.loads((folder / "checkpoints/step-000012/state.json").read_text())
        for folder in (whole.folder, tmp_path / "half")
    ]
    assert states[0]["best_value"] == states[1]["best_value"]
    assert states[0]["best_value"] is not None


def _better(loss, value, *, best, higher):
    state = State(best_loss=best[0], best_value=best[1], best_step=1)
    return _is_better(SimpleNamespace(higher_is_better=higher), state, loss, value)


def test_what_is_better():
    assert _better(1.0, 0.6, best=(0.5, 0.5), higher=True)
    assert not _better(0.1, 0.4, best=(0.5, 0.5), higher=True)
    assert _better(0.4, 0.5, best=(0.5, 0.5), higher=True)  # equal: the loss decides
    assert not _better(0.5, 0.5, best=(0.5, 0.5), higher=True)
    assert _better(1.0, 0.4, best=(0.5, 0.5), higher=False)
    assert not _better(math.inf, None, best=(0.5, None), higher=False)
    assert _is_better(SimpleNamespace(higher_is_better=True), State(), 3.0, 0.0)


def test_a_checkpoint_of_an_older_release_is_read():
    assert State.of({"step": 3, "best_loss": 1.0, "best_step": 2, "worse": 0, "tokens": 5, "seconds": 1.0}) == State(
        3, 1.0, 2, None, 0, 5, 1.0
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"best_by": "exact", "held_out": 0}, "best_by: exact is measured on held-out rows, and held_out keeps none"),
        ({"best_by": "accuracies"}, "'accuracies' is no metric"),
        ({"metrics": ["rouge"]}, "'rouge' is no metric"),
        ({"metrics": ["nowhere:at_all"]}, "The metric nowhere:at_all cannot be imported"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_start(options, match, tiny_folder, rows_file, tmp_path):
    with pytest.raises(ConfigError, match=match):
        train(tiny_folder, rows_file, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_accuracy_is_of_labels(tiny_folder, tmp_path):
    rows = tmp_path / "own.jsonl"
    words = [a + b + c for a in "bcdf" for b in "aeio" for c in "tn"]
    rows.write_text("".join(json.dumps({"prompt": f"{w}:", "completion": f" {w[::-1]}"}) + "\n" for w in words))
    with pytest.raises(ConfigError, match="best_by: accuracy is of rows whose answers are a few labels"):
        train(tiny_folder, rows, tmp_path / "run", best_by="accuracy")


def test_a_metric_that_fails_ends_the_run_with_the_row(tiny_folder, rows_file, tmp_path, monkeypatch):
    (tmp_path / "own_that_fails.py").write_text("def m(prediction, row):\n    raise ValueError('no key')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"^The metric own_that_fails:m failed at .*rows.jsonl:\d+: ValueError: 'no key'"
    ):
        train(tiny_folder, rows_file, tmp_path / "run", metrics=["own_that_fails:m"])


def test_metrics_of_numbers_and_of_classes(tiny_encoder, finished_classifier, own, tmp_path):
    found = veneer.evaluate(finished_classifier, metrics=["exact"], examples=0)
    assert found.adapter.metrics["exact"] == found.adapter.choice_accuracy
    (tmp_path / "own_of_numbers.py").write_text(
        "def error(prediction, row):\n    return abs(prediction - float(row['answer']))\n"
        "error.higher_is_better = False\n"
    )
    rows = [{"text": "abcdefgh"[n % 8] * (1 + n // 8), "label": n % 8 / 2} for n in range(32)]
    result = veneer.train(
        str(tiny_encoder), data=rows, output=str(tmp_path / "numbers"), task="regression", steps=3, held_out=8,
        best_by="own_of_numbers:error", evaluate_every=1, console=QUIET,
    )  # fmt: skip
    found = veneer.evaluate(result.folder, metrics=["own_of_numbers:error"], examples=0)
    assert found.adapter.metrics["own_of_numbers:error"] == pytest.approx(found.adapter.numbers.mae)
    with pytest.raises(ConfigError, match="exact compares texts, and the model gives numbers"):
        veneer.evaluate(result.folder, metrics=["exact"], examples=0)


def test_plain_text_has_no_answer_to_measure(tiny_folder, tmp_path):
    rows = [{"text": f"word {letter * 3} and more"} for letter in "abcdefghijklmnop"]
    with pytest.raises(DataError, match="is plain text, so there is no one right answer to measure by a metric"):
        train(tiny_folder, tmp_path, tmp_path / "run", data=rows, metrics=["exact"])


def test_the_options_are_those_of_a_run():
    config = TrainConfig(model="m", data="d", output="o", metrics=["exact", "a:b"], best_by="a:b")
    assert (config.metrics, config.best_by) == (["exact", "a:b"], "a:b")
    with pytest.raises(ConfigError, match=r"metric_for_best_model.*best_by"):
        TrainConfig(model="m", data="d", output="o", metric_for_best_model="loss")
    assert issubclass(TrainingError, veneer.VeneerError)
