"""Runs with method adalora: what they leave, and that a broken one ends in the bytes of an unbroken one."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import veneer
from veneer.errors import ConfigError, TrainingError
from veneer.runs import train as run
from veneer.runs.folder import RunFolder
from veneer.training import loop
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit

# Ranks are taken in steps 3 to 8 of 12.
OPTIONS = {
    "method": "adalora", "initial_rank": 4, "target_rank": 2, "tinit": 2, "tfinal": 4, "steps": 12, "batch_size": 8,
    "learning_rate": 1e-2, "checkpoint_every": 1, "keep_checkpoints": 12, "evaluate_every": 3, "held_out": 8,
    "dropout": 0.1,
}  # fmt: skip
MATRICES = 14


@pytest.fixture
def options(tiny_folder, rows_file, tmp_path):
    return {**OPTIONS, "model": str(tiny_folder), "data": str(rows_file), "output": str(tmp_path / "run")}


def _train(options, **more):
    return veneer.train(**{**options, **more}, console=Console(file=io.StringIO()))


def _bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_what_a_run_leaves(options):
    result = _train(options)
    fields = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["init_r"], fields["total_step"]) == ("ADALORA", 4, 12)
    assert sum(map(sum, fields["rank_pattern"].values())) == 2 * MATRICES
    records = RunFolder(result.folder).metrics()
    budgets = [record["budget"] for record in records if "budget" in record]
    assert budgets == [56, 56, *(int(28 + 28 * (1 - i / 6) ** 3) for i in range(1, 7)), 28, 28, 28, 28]
    assert all(record["orthogonality_deviation"] > 0 for record in records if "budget" in record)
    ranks = {record["step"]: record["ranks"] for record in records if "ranks" in record}
    assert sorted(ranks) == [0, 3, 6, 9, 12]
    assert sum(ranks[3].values()) == budgets[2]
    assert sum(ranks[12].values()) == 28
    # Before the ranks are fixed no adapter is the best, whatever its loss: it is larger than was asked for.
    assert result.best_step in (9, 12)
    assert TrainConfig.read(result.folder / "config.yaml") == TrainConfig(**options)
    assert veneer.trainable(result.model).rows
    assert veneer.allocator(result.model).fixed


@pytest.mark.parametrize("optimizer", ["adamw", "paged-adamw"])
@pytest.mark.parametrize("at", [1, 5, 7, 8, 10])
def test_broken_off_at_any_phase_it_ends_in_the_same_bytes(options, tmp_path, monkeypatch, at, optimizer):
    whole = _train(options, output=str(tmp_path / "whole"))
    step, taken = loop.take_step, 0

    def breaks(*args):
        nonlocal taken
        if taken == at:
            raise KeyboardInterrupt
        taken += 1
        return step(*args)

    monkeypatch.setattr(loop, "take_step", breaks)
    memory = {} if optimizer == "adamw" else {"optimizer_memory": "1MB"}
    with pytest.raises(KeyboardInterrupt):
        _train(options, optimizer=optimizer, **memory)
    monkeypatch.setattr(loop, "take_step", step)
    resumed = run.resume(options["output"], console=Console(file=io.StringIO()))
    assert _bytes(resumed.folder) == _bytes(whole.folder)
    assert (resumed.folder / "adapter/adapter_config.json").read_bytes() == (
        whole.folder / "adapter/adapter_config.json"
    ).read_bytes()
    same = [
        [{k: v for k, v in record.items() if k not in ("tokens_per_second", "peak_memory")} for record in records]
        for records in (RunFolder(whole.folder).metrics(), RunFolder(resumed.folder).metrics())
    ]
    assert same[0] == same[1]


def test_other_steps_when_resumed_are_refused_until_the_ranks_are_fixed(options, monkeypatch):
    step = loop.take_step
    for stop, match in ((5, "AdaLoRA was taking ranks from step 2 to 8, and would now from 2 to 16"), (10, None)):
        taken = 0

        def breaks(*args, stop=stop):
            nonlocal taken
            if taken == stop:
                raise KeyboardInterrupt
            taken += 1
            return step(*args)

        monkeypatch.setattr(loop, "take_step", breaks)
        options["output"] += "-"
        with pytest.raises(KeyboardInterrupt):
            _train(options)
        monkeypatch.setattr(loop, "take_step", step)
        if match:
            with pytest.raises(TrainingError, match=match):
                run.resume(options["output"], steps=20)
        else:
            result = run.resume(options["output"], steps=20, console=Console(file=io.StringIO()))
            assert result.steps == 20
            assert sum(veneer.allocator(result.model).ranks().values()) == 2 * MATRICES


def test_an_attached_adapter_keeps_its_schedule(options, tmp_path):
    model, tokenizer = veneer.load(options["model"])
    veneer.attach(model, veneer.AdaLoRA(initial_rank=4, target_rank=2, total_steps=10))
    rest = {name: options[name] for name in ("data", "output", "held_out", "batch_size", "learning_rate")}
    quiet = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match="has taken 0 of total_steps = 10, and the run takes 12 from the start"):
        veneer.train(model, tokenizer, **rest, steps=12, console=quiet)
    result = veneer.train(model, tokenizer, **rest, steps=10, console=quiet)
    config = TrainConfig.read(result.folder / "config.yaml")
    assert (config.method, config.initial_rank, config.target_rank) == ("adalora", 4, 2)
    assert veneer.allocator(model).fixed
    # With its ranks fixed it trains on for as long as one likes.
    rest["output"] = str(tmp_path / "more")
    assert veneer.train(model, tokenizer, **rest, steps=3, console=quiet).steps == 3


def test_half_trained_it_is_refused(options):
    model, tokenizer = veneer.load(options["model"])
    veneer.attach(model, veneer.AdaLoRA(initial_rank=4, target_rank=2, total_steps=10))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    del optimizer
    with pytest.raises(ConfigError, match="has taken 1 of total_steps = 10"):
        veneer.train(model, tokenizer, data=options["data"], output=options["output"], steps=10)


def test_it_trains_over_codes_and_merges(options, tmp_path):
    result = _train(options, storage="nf4", output=str(tmp_path / "nf4"))
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        adapted = result.model(input_ids=ids).logits
        veneer.merge(result.model, reversible=False)
        torch.testing.assert_close(result.model(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"initial_rank": 4},
            "initial_rank is an option of method: adalora, and the method is lora, which has",
        ),
        (
            {"method": "adalora", "rank": 4},
            "rank is an option of method: lora, and the method is adalora, which has",
        ),
        ({"method": "adalora", "target_rank": 9, "initial_rank": 8}, "initial_rank = 8 is less than target_rank = 9"),
        ({"method": "adalora", "budget": "0.3M", "target_rank": 4}, "say the same thing in two ways"),
        (
            {"method": "adalora", "budget": "much"},
            r"budget = 'much' is neither a number of parameters",
        ),
    ],
)
def test_options_that_make_no_sense(options, match):
    with pytest.raises(ConfigError, match=match):
        TrainConfig(model="m", data="d", output="o", **options)
