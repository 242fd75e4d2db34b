"""log_to: the real MLflow and Weights & Biases get a run's numbers, without a network."""

from __future__ import annotations

import io

import mlflow
import pytest
import wandb
from rich.console import Console

import veneer
from veneer.errors import ConfigError
from veneer.runs.folder import RunFolder

pytestmark = pytest.mark.interop


@pytest.fixture
def options(tiny_folder, rows_file, tmp_path):
    return {
        "model": str(tiny_folder), "data": str(rows_file), "output": str(tmp_path / "first"), "steps": 3, "rank": 2,
        "batch_size": 8, "held_out": 8, "console": Console(file=io.StringIO()),
    }  # fmt: skip


def test_mlflow_has_options_and_numbers(options, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    result = veneer.train(**options, log_to="mlflow")
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["rank"] == "2"
    losses = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    records = [record for record in RunFolder(result.folder).metrics() if "loss" in record]
    assert [(m.step, m.value) for m in losses] == [(record["step"], record["loss"]) for record in records]
    held_out = mlflow.MlflowClient().get_metric_history(run.info.run_id, "held_out_loss")
    assert [m.step for m in held_out] == [0, 3]
    shares = mlflow.MlflowClient().get_metric_history(run.info.run_id, "held_out_accuracy")
    evaluations = [record for record in RunFolder(result.folder).metrics() if "held_out_loss" in record]
    assert [m.value for m in shares] == [record["held_out_accuracy"] for record in evaluations]


def test_a_run_that_fails_is_marked_as_failed(options, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())

    class Raises:
        def on_step(self, record):
            raise KeyError("mine")

        def on_evaluation(self, record):
            pass

    with pytest.raises(KeyError):
        veneer.train(**options, log_to=["mlflow"], callbacks=[Raises()])
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.status == "FAILED"


def test_wandb_has_options_and_numbers(options, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logged = []
    log = wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run,
        "log",
        lambda run, values, step: logged.append((step, values)) or log(run, values, step),
    )
    veneer.train(**options, log_to="wandb")
    assert [step for step, values in logged if "loss" in values] == [1, 2, 3]
    assert [step for step, values in logged if "held_out_loss" in values] == [0, 3]
    assert wandb.run is None, "its run has ended"


def test_a_tracker_that_is_not_installed_is_refused_before_anything(options, tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.training.trackers.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"log_to: wandb needs a package that is not installed: pip install 'veneer\[wandb"
    ):
        veneer.train(**options, log_to=["wandb"])
    assert not (tmp_path / "first").exists()
    with pytest.raises(ConfigError, match="log_to"):
        veneer.train(**options, log_to="tensorbored")
