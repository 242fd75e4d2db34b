"""train looks first: it refuses what cannot fit, records what it foresaw, recomputes what memory asks for."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.console import Console
from transformers import AutoTokenizer

import tiny
import veneer
from veneer.errors import ModelError, TargetError, TrainingError
from veneer.host_memory import mapped_memory
from veneer.models import source
from veneer.models.bnb_file import write_folder
from veneer.planning import empty
from veneer.planning.config import PlanOptions
from veneer.planning.empty import base_of
from veneer.planning.machine import Machine
from veneer.planning.plan import plan
from veneer.runs import memory as planned
from veneer.runs import train as run
from veneer.runs.folder import RunFolder
from veneer.training.config import TrainConfig
from veneer.units import amount, compared

pytestmark = pytest.mark.unit


@pytest.fixture
def options(tiny_folder, rows_file, tmp_path):
    return {
        "model": str(tiny_folder), "data": str(rows_file), "output": str(tmp_path / "run"), "steps": 2, "rank": 4,
        "batch_size": 8, "held_out": 0, "learning_rate": 1e-2,
    }  # fmt: skip


def _train(options, **more):
    console = Console(file=io.StringIO(), width=200)
    return veneer.train(**{**options, **more}, console=console), console.file.getvalue()


def _look(config):
    planned.look_before_loading(config, planned.Process.now())


def _adapter(result):
    return (result.folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_what_was_foreseen_is_told_and_recorded(options):
    result, shown = _train(options)
    assert "Predicted memory: " in shown
    told = json.loads(RunFolder(result.folder).plan_file.read_text())
    assert told["peak"] == sum(told["terms"].values()) < told["limit"]
    assert told["recomputed"] == 0


def test_where_memory_is_plenty_the_plan_comes_after_the_first_step_and_changes_nothing(options, tmp_path, monkeypatch):
    after, shown = _train(options, dropout=0.1)
    assert shown.index("step 1/2") < shown.index("Predicted memory: ") < shown.index("step 2/2")
    monkeypatch.setattr(planned, "generous", lambda *_: float("inf"))
    before, shown = _train(options, dropout=0.1, output=str(tmp_path / "before"))
    assert shown.index("Predicted memory: ") < shown.index("step 1/2")
    assert _adapter(after) == _adapter(before)
    one, two = (json.loads(RunFolder(result.folder).plan_file.read_text()) for result in (after, before))
    for told in (one, two):
        del told["terms"]["runtime"]
    assert one["terms"] == two["terms"]


def test_a_run_by_epochs_is_planned_by_the_steps_that_it_takes(options):
    del options["rank"], options["steps"]
    long = {"method": "adalora", "tinit": 50, "tfinal": 60, "epochs": 20}
    result, shown = _train(options, **long)
    assert "Predicted memory: " in shown
    assert json.loads(RunFolder(result.folder).plan_file.read_text())["steps"] == result.steps == 120


def test_more_than_any_step_takes_is_more_than_is_foreseen(tiny_folder):
    from veneer.data.labels import Tokens
    from veneer.training.loss import How, Loss

    model, _ = veneer.load(tiny_folder)
    veneer.attach(model, veneer.AdaLoRA(target_rank=4, total_steps=10))
    rows = [Tokens([1] * 128, [1] * 128, "")] * 64
    asked = PlanOptions(model=str(tiny_folder), method="adalora", target_rank=4, batch_size=64, max_length=128)
    made = plan(asked, Machine({}, 0.0, 0, 0))
    loss = Loss(model, 0, rows[0], kind="causal")
    assert planned.generous(model, loss, rows) > made.training + planned._LOSS
    short = [rows[0], *(Tokens([1], [1], ""),) * 63]
    assert planned.generous(model, loss, short) == pytest.approx(planned.generous(model, loss, rows), rel=0.01), (
        "rows may be padded to the longest"
    )
    whole = Loss(model, 0, rows[0], kind="causal", how=How(False, False))
    assert planned.generous(model, whole, rows) == float("inf"), "all logits are there at once"
    model.config = SimpleNamespace(hidden_size=32, num_hidden_layers=2)
    assert planned.generous(model, loss, rows) == float("inf"), "nothing is known of such a model"


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(options, tmp_path):
    with pytest.raises(TrainingError, match=r"would take .* [MG]B of memory, and 10\.0 MB are available.*check_memory"):
        _train(options, memory="10MB")
    assert not (tmp_path / "run" / "config.yaml").exists()
    _train(options, memory="10MB", check_memory=False)
    assert (tmp_path / "run" / "adapter").is_dir()


def test_recomputing_changes_no_bit_of_the_result(options, tmp_path, monkeypatch):
    plain, _ = _train(options)
    whole, _ = _train(options, gradient_checkpointing=True, output=str(tmp_path / "whole"))
    foreseen, asked, really = planned.predicted, [], run.recomputed
    monkeypatch.setattr(run, "recomputed", lambda model, count: asked.append(count) or really(model, count))
    monkeypatch.setattr(planned, "generous", lambda *_: float("inf"))
    monkeypatch.setattr(planned, "predicted", lambda *known, **more: replace(foreseen(*known, **more), recomputed=1))
    part, shown = _train(options, output=str(tmp_path / "part"))
    assert asked == [1]
    assert "Activations of 1 of 2 layers will be recomputed (gradient checkpointing)." in shown
    assert json.loads(RunFolder(part.folder).plan_file.read_text())["recomputed"] == 1
    assert _adapter(plain) == _adapter(part) == _adapter(whole)


def test_a_model_that_is_too_large_is_not_even_loaded(options, monkeypatch):
    monkeypatch.setattr(planned.Checkpoint, "weight_bytes", lambda checkpoint: 10**15)
    monkeypatch.setattr(planned, "usable_memory", lambda _: 10**6)
    monkeypatch.setattr(run, "prepare", lambda *arguments: pytest.fail("it was loaded"))
    with pytest.raises(TrainingError, match="would take"):
        _train(options)


def test_a_model_that_is_too_large_is_not_even_fetched(options, tiny_folder, tmp_path, monkeypatch):
    cache = tmp_path / "snapshot"

    def fetch(name, allow_patterns, local_files_only=False, revision=None):
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        assert allow_patterns == ["config.json"], "it was fetched"
        cache.mkdir(exist_ok=True)
        shutil.copy(tiny_folder / "config.json", cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(source, "hub_unreachable", lambda: "")
    monkeypatch.setattr(planned, "usable_memory", lambda _: 10**6)
    with pytest.raises(TrainingError, match="would take"):
        _train({**options, "model": "somebody/large"})


def test_a_model_that_cannot_be_planned_is_loaded(looking_at_values, options, monkeypatch):
    monkeypatch.setattr(planned.Checkpoint, "weight_bytes", lambda checkpoint: 10**15)
    config = TrainConfig(**{**options, "model": looking_at_values, "task": "classification"})
    _look(config)
    with pytest.raises(TargetError, match="q_porj"):  # what the user can mend is still told
        _look(TrainConfig(**options, targets="q_porj"))


def test_a_model_that_came_loaded_is_looked_at_too(options, tiny_folder):
    model, tokenizer = veneer.load(tiny_folder, storage="nf4")
    with pytest.raises(TrainingError, match="would take"):
        _train({**options, "model": model}, tokenizer=tokenizer, memory="10MB")


@pytest.mark.parametrize("known", [None, Machine({}, 0.0, 10**6, 10**6)])
def test_the_runtime_is_what_the_process_has_beside_the_model(known, monkeypatch):
    monkeypatch.setattr(planned, "remembered", lambda: known)
    before = planned.Process.now().at()
    data = torch.ones(50 * 10**6)
    beside = planned.Process.now().at()
    assert beside.runtime - before.runtime == pytest.approx(data.nbytes, rel=0.05)
    assert beside.loading - before.loading == pytest.approx(data.nbytes, rel=0.05)
    model = torch.nn.ParameterList([data])
    assert planned.Process.now(model).at().runtime - before.runtime == pytest.approx(0, abs=0.05 * data.nbytes)


def test_what_the_process_has_let_go_is_not_of_the_runtime(monkeypatch):
    monkeypatch.setattr(planned, "remembered", lambda: None)
    before = planned.Process.now().at()
    blocks = [bytearray(b"1" * 60_000) for _ in range(4_000)]
    last = blocks.pop()  # below it the heap cannot shrink by itself
    del blocks
    assert planned.Process.now().at().runtime - before.runtime < 4_000 * len(last) / 10


def test_the_runtime_is_not_less_than_was_measured(monkeypatch):
    known = Machine({}, 0.0, 10**14, 10**13)
    monkeypatch.setattr(planned, "remembered", lambda: known)
    assert planned.Process.now().at() == known


def test_tensors_of_a_mapped_file_are_told_from_others(tiny_folder):
    model, _ = veneer.load(tiny_folder)
    assert mapped_memory(model.parameters()) == sum(parameter.nbytes for parameter in model.parameters())
    model, _ = veneer.load(tiny_folder, storage="int8")
    assert mapped_memory([*model.parameters(), *model.buffers()]) == 0
    assert mapped_memory([torch.ones(10**6), torch.ones(10**6).share_memory_()]) == 0


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """The tiny model as it is, in 16 bits, and as bitsandbytes keeps it."""
    model, tokenizer = veneer.load(tiny_folder)
    short, coded = tmp_path_factory.mktemp("short"), tmp_path_factory.mktemp("coded")
    model.to(torch.bfloat16).save_pretrained(short)
    quantised, _ = veneer.load(tiny_folder, storage="nf4")
    write_folder(quantised, coded, torch.bfloat16)
    for folder in (short, coded):
        tokenizer.save_pretrained(folder)
    return {"fp32": tiny_folder, "bf16": short, "bitsandbytes": coded}


@pytest.mark.parametrize(
    ("file", "storage", "mapped"),
    [
        ("fp32", "fp32", ("dense",)),
        ("fp32", "bf16", ()),
        ("fp32", "nf4", ()),
        ("bf16", "fp32", ()),
        ("bf16", "bf16", ("dense",)),
        ("bf16", "int8", ()),
        ("bitsandbytes", "fp32", ("codes", "scales")),
        ("bitsandbytes", "bf16", ("codes", "scales", "dense")),
    ],
)
def test_what_will_be_mapped_is_what_is_mapped(file, storage, mapped, folders):
    model, _ = veneer.load(folders[file], storage=storage)
    veneer.attach(model, veneer.LoRA())
    assert planned.mapped_parts(model) == mapped
    assert base_of(str(folders[file]), storage, 64, True).mapped == mapped


@pytest.fixture(scope="module")
def mixtures(tiny_folder, tmp_path_factory):
    """A tiny mixture of experts in 32 and in 16 bits."""
    found = {}
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[name] = tmp_path_factory.mktemp(f"mixture-{name}")
        model = tiny.build("olmoe")
        model.resize_token_embeddings(len(tokenizer))
        model.to(dtype).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.mark.parametrize(
    ("file", "storage", "compute", "mapped"),
    [
        ("fp32", "fp32", "fp32", ("dense",)),
        ("fp32", "nf4", "fp32", ()),
        ("bf16", "fp32", "fp32", ()),
        ("bf16", "bf16", "bf16", ("dense",)),
        ("bf16", "bf16", "fp32", ("dense",)),
        ("bf16", "nf4", "fp32", ()),
        ("fp32", "fp32", "bf16", ("dense",)),
        ("fp32", "nf4", "bf16", ()),
    ],
)
def test_a_mixtures_experts_are_not_mapped_and_the_pages_that_they_came_from_are_there(
    file, storage, compute, mapped, mixtures
):
    model, _ = veneer.load(mixtures[file], storage=storage, compute=compute)
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    in_file = {"fp32": 4, "bf16": 2}[file] * sum(weight.numel() for weight in experts)
    held = mapped_memory(model.parameters())
    veneer.attach(model, veneer.LoRA())
    made = plan(PlanOptions(model=str(mixtures[file]), storage=storage, compute=compute), Machine({}, 0.0, 0, 0))
    beside = made.terms.get("pages beside", 0)

    assert planned.mapped_parts(model) == base_of(str(mixtures[file]), storage, 64, True).mapped == mapped
    assert beside == (in_file if mapped else 0)
    size = 4 if file == "fp32" else 2  # of what is held rounded, its own values are there as well
    norms = [weight for name, weight in model.named_parameters() if "norm" in name or ".gate." in name]
    small = sum(weight.numel() * (weight.itemsize + (size if size > weight.itemsize else 0)) for weight in norms)
    small += sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    assert 0 <= made.mapped - (held + beside if mapped else 0) <= small, "but for what is computed, or in another type"
    assert made.training - made.mapped >= sum(weight.nbytes for weight in experts)
    if storage == "nf4":  # experts are read and coded one after another
        assert experts == []
        plain = plan(PlanOptions(model=str(mixtures[file])), Machine({}, 0.0, 0, 0))
        assert made.loading < plain.loading


def test_of_a_model_that_came_loaded_the_mapped_base_is_not_needed(options, tiny_folder):
    model, tokenizer = veneer.load(tiny_folder)
    held = sum(parameter.nbytes for parameter in model.parameters())
    result, _ = _train({**options, "model": model}, tokenizer=tokenizer)
    told = json.loads(RunFolder(result.folder).plan_file.read_text())
    assert held <= told["mapped"] == told["peak"] - told["needed"]


def test_pages_that_need_not_fit_are_spoken_of_where_the_rest_does(tiny_folder):
    config = PlanOptions(model=str(tiny_folder), batch_size=1, max_length=8)
    made = plan(config, Machine({}, 0.0, 10**6, 10**6))
    said = f"{(made.peak - made.needed) / 1e6:,.1f} MB of it are pages of the base's file, which need not fit."
    assert planned.sentences(config, made, made.needed)[1:] == (said,)
    assert planned.sentences(config, made, made.peak)[1:] == ()
    short_of = made.needed - 1
    available, peak, needed = compared(short_of, made.peak, made.needed)
    assert needed != available
    assert planned.sentences(config, made, short_of) == (
        f"Predicted memory: {peak} ({available} available).",
        f"{needed} of it must fit, which is more than is available: the run may run out of memory.",
    )
    refused = planned.refusal(
        config, planned.Process.now(), made, 10**6, {"base": base_of(str(tiny_folder), "fp32", 64, True)}
    )
    assert refused.startswith(f"This run would take {amount(made.needed)} of memory, and 1.0 MB are available. ")


def test_what_would_fit_is_found_without_looking_for_the_base_again(options, tiny_encoder, monkeypatch):
    model, tokenizer = veneer.load(tiny_encoder, labels=["yes", "no"])
    model.name_or_path = "nobody/nothing"
    monkeypatch.setattr(empty, "checkpoint_of", lambda name: pytest.fail("it was looked for"))
    monkeypatch.setattr(planned.Process, "at", lambda _: Machine({}, 0.0, 0, 0))
    monkeypatch.setattr(planned, "limit_of", lambda *_: 500_000)
    del options["model"]
    with pytest.raises(TrainingError, match="These would fit: micro_batch_size"):
        _train({**options, "model": model, "batch_size": 32}, tokenizer=tokenizer)


def test_what_cannot_be_foreseen_is_said_and_no_reason_to_stop(options, monkeypatch):
    def fails(*arguments, **more):
        raise ModelError("no such shape")

    monkeypatch.setattr(planned, "predicted", fails)
    _, shown = _train(options)
    assert "The memory of this run cannot be predicted: no such shape" in shown
    said = "The memory of this run cannot be predicted, so memory = 10GB cannot be kept to: no such shape"
    with pytest.raises(TrainingError, match=said):
        _train({**options, "output": f"{options['output']}-bounded"}, memory="10GB")


def test_a_run_that_has_begun_is_not_refused(options, monkeypatch):
    monkeypatch.setattr(planned, "limit_of", lambda *_: 10**6)
    monkeypatch.setattr(planned, "generous", lambda *_: 0.0)
    result, shown = _train(options)
    assert "Predicted memory: " in shown
    assert (result.folder / "adapter").is_dir()
