"""auto: a GPU that holds the run by the plan, else the CPU; a run that began stays where it is."""

from __future__ import annotations

import pytest
from torch import nn

import veneer
from veneer import device
from veneer.commands.merge import merge_to
from veneer.errors import ConfigError
from veneer.runs import placing
from veneer.runs.computing import refuse_other_device
from veneer.runs.folder import RunFolder
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit


@pytest.fixture
def with_gpus(monkeypatch):
    """A function that gives this machine GPUs: name → bytes available."""

    def give(**memory: int) -> None:
        there = {name.replace("_", ":"): size for name, size in memory.items()}
        monkeypatch.setattr(placing, "gpus", lambda: list(there))
        monkeypatch.setattr(placing, "usable_memory", there.__getitem__)
        monkeypatch.setattr(device, "gpus", lambda: list(there))

    return give


@pytest.fixture
def config(tiny_folder, rows_file, tmp_path):
    return TrainConfig(model=str(tiny_folder), data=str(rows_file), output=str(tmp_path / "run"), steps=2)


def test_without_a_gpu_nothing_is_planned_or_said(with_gpus, config, monkeypatch):
    with_gpus()
    monkeypatch.setattr(placing, "predicted", lambda *_, **__: pytest.fail("planned"))
    assert placing.place_of_run(RunFolder(config.output), config, {}) == ("cpu", [])
    assert placing.place_for_use(config.model, "auto") == "cpu"


def test_the_first_gpu_that_holds_the_run(with_gpus, config):
    with_gpus(cuda_0=10**6, cuda_1=10**11)
    name, notes = placing.place_of_run(RunFolder(config.output), config, {})
    assert name == "cuda:1"
    assert notes[0].startswith("cuda:0 is left alone: ")
    assert notes[1].startswith("On cuda:1: ")
    assert placing.place_for_use(config.model, "auto") == "cuda:1"
    with_gpus(cuda_0=10**6)
    name, notes = placing.place_of_run(RunFolder(config.output), config, {})
    assert name == "cpu"
    assert len(notes) == 1


def test_a_run_stays_where_it_began(with_gpus, config, monkeypatch):
    run = RunFolder(config.output)
    monkeypatch.setattr(placing, "began", lambda run: True)
    with_gpus(cuda_0=10**11)
    assert placing.place_of_run(run, config, {}) == ("cpu", [])
    monkeypatch.setattr(RunFolder, "chosen", lambda run: {"device": "cuda:0"})
    assert placing.place_of_run(run, config, {}) == ("cuda:0", [])
    with_gpus()
    name, said = placing.place_of_run(run, config, {})
    assert (name, said) == ("cpu", ["The run began on cuda:0, which is not here: it goes on on the CPU."])


def test_a_loaded_model_stays_where_it_is(tiny_folder, rows_file, tmp_path):
    model, tokenizer = veneer.load(tiny_folder)
    with pytest.raises(ConfigError, match="There is no cuda here"):
        veneer.train(model, tokenizer, data=str(rows_file), output=str(tmp_path / "run"), steps=1, device="cuda")


def test_a_loaded_model_on_another_device_is_refused():
    with pytest.raises(
        ConfigError, match=r"^This should be on cpu, and the model is on meta; load it with device='cpu'"
    ):
        refuse_other_device(nn.Linear(2, 2, device="meta"), "cpu")


def test_a_gguf_file_is_merged_on_the_cpu(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^device is for format folder: GGUF files are computed on the CPU; leave it"
    ):
        merge_to(tmp_path, tmp_path / "m.gguf", format="gguf", storage="fp16", device="cuda")
