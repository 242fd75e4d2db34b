"""NEFTune's noise: ±alpha / √(L · dim) by each row's own length, while training alone; and runs with it and LoRA+."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import tiny
import veneer
from veneer.data.labels import Tokens
from veneer.errors import ArgumentError, ConfigError, TargetError
from veneer.planning.config import PlanOptions
from veneer.planning.plan import NO_MACHINE, plan
from veneer.training.loop import take_step
from veneer.training.loss import Loss
from veneer.training.noise import noise_on_embeddings
from veneer.training.world import OneProcess

pytestmark = pytest.mark.unit


def _noise(model, ids, lengths):
    embedding = model.get_input_embeddings()
    with noise_on_embeddings(model, 5.0, lengths):
        noisy = embedding(ids)
    return noisy - embedding(ids)


@pytest.mark.parametrize("packed", [False, True])
def test_the_bound_is_of_the_rows_own_length(packed):
    torch.manual_seed(0)
    model, lengths = tiny.build("llama"), [3, 48]
    ids = torch.ones(1, 51, dtype=torch.long) if packed else torch.ones(2, 48, dtype=torch.long)
    noise = _noise(model, ids, lengths)
    rows = noise[0].split(lengths) if packed else (noise[0, :3], noise[1])
    for row, length in zip(rows, lengths, strict=True):
        bound = 5 / (length * 32) ** 0.5
        assert 0.95 * bound < row.abs().max() <= bound * 1.00001
        assert row.mean().abs() < 0.15 * bound


@pytest.mark.parametrize("name", ["llama", "gptneox"])
def test_log_probabilities_have_it_in_training_alone(name):
    """What DPO, ORPO and KTO compare; their reference is measured in eval mode."""
    torch.manual_seed(0)
    model = tiny.build(name)
    rows = [Tokens([4, 5, 6], [-100, 5, 6], "d:1"), Tokens([4, 7], [-100, 7], "d:1")]
    plain, noisy = (Loss(model, 0, rows[0], kind="causal", noise=noise) for noise in (0.0, 5.0))
    model.eval()
    assert torch.equal(noisy.log_probabilities(rows), plain.log_probabilities(rows))
    model.train()
    assert not torch.allclose(noisy.log_probabilities(rows), plain.log_probabilities(rows))


@pytest.mark.parametrize("name", ["llama", "gptneox", "t5", "bert"])
def test_a_loss_has_it_in_training_alone(name):
    torch.manual_seed(0)
    model = tiny.build(name)
    kind = {"t5": "seq2seq", "bert": "classification"}.get(name, "causal")
    labels = [1] if kind == "classification" else [-100, 5, 6]
    rows = [Tokens([4, 5, 6], labels, ""), Tokens([7, 5, 6], labels, "")]
    plain, noisy = (Loss(model, 0, rows[0], kind=kind, noise=noise) for noise in (0.0, 5.0))
    expected = plain(rows)
    assert torch.equal(noisy(rows), expected)
    assert noisy.mean(rows, 2) == plain.mean(rows, 2)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    assert torch.equal(plain(rows), plain(rows))
    assert not torch.equal(noisy(rows), plain(rows))
    assert noisy.mean(rows, 2) == plain.mean(rows, 2)


def test_a_model_without_tokens_is_refused():
    with pytest.raises(TargetError, match="neftune puts noise on the embeddings of tokens, and a Sequential has none"):
        Loss(torch.nn.Sequential(), 0, Tokens([1], [1], ""), kind="classification", noise=5.0)


def test_a_run_that_is_stopped_ends_in_the_same_bytes(tiny_folder, rows_file, tmp_path):
    over = {"neftune": 5.0, "lora_plus": 4.0, "dora": True, "optimizer": "paged-adamw"}

    def trained(name, **more):
        return veneer.train(
            str(tiny_folder), data=str(rows_file), output=str(tmp_path / name), rank=2, batch_size=8, held_out=0,
            learning_rate=1e-2, schedule="constant", warmup=0, checkpoint_every=2,
            console=Console(file=io.StringIO()), **more,
        ).folder  # fmt: skip

    whole, part = trained("whole", steps=4, **over), trained("part", steps=2, **over)
    veneer.resume(part, steps=4, console=Console(file=io.StringIO()))
    files = [folder / "adapter/adapter_model.safetensors" for folder in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_b_has_its_share_of_every_rate():
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]))
    groups = veneer.lora_plus(model, 0.001, 8)
    optimizer = torch.optim.SGD(groups)

    class Part:
        config = type("Config", (), {"micro_batch_size": None, "clip": 0.0})()
        batches = held_out = None

    run = Part()
    run.model, run.optimizer, run.world = model, optimizer, OneProcess()
    run.loss = Loss(model, 0, Tokens([4, 5, 6], [-100, 5, 6], ""), kind="causal")
    update = model.model.layers[0].self_attn.q_proj.updates["default"]
    before = update.B.detach().clone()
    take_step(run, [Tokens(inputs["input_ids"][0].tolist(), inputs["input_ids"][0].tolist(), "")], rate=0.5)
    torch.testing.assert_close(update.B.detach(), before - 8 * 0.5 * update.B.grad)


def test_groups_and_options_that_make_no_sense():
    model = tiny.build("llama")
    with pytest.raises(TargetError, match="lora_plus is for LoRA adapters, and none is active"):
        veneer.lora_plus(model, 1e-3)
    veneer.attach(model, veneer.AdaLoRA(targets=["q_proj"], target_rank=2, total_steps=10))
    with pytest.raises(TargetError, match="'default' is AdaLoRA"):
        veneer.lora_plus(model, 1e-3)
    with pytest.raises(ArgumentError, match="takes a number above 0 as ratio, not the str"):
        veneer.lora_plus(model, 1e-3, "16")
    run = {"model": "m", "data": "d", "output": "o"}
    with pytest.raises(ConfigError, match="lora_plus is an option of method: lora, and the method is adalora"):
        veneer.training.config.TrainConfig(**run, method="adalora", lora_plus=4)
    with pytest.raises(ConfigError, match="neftune_noise_alpha is neftune"):
        veneer.training.config.TrainConfig(**run, neftune_noise_alpha=5)


def test_the_plan_counts_the_noise(tiny_folder):
    asked = {"model": str(tiny_folder), "batch_size": 4, "max_length": 64}
    plain, noisy = (plan(PlanOptions(**asked, neftune=alpha), NO_MACHINE) for alpha in (0.0, 5.0))
    assert noisy.training >= plain.training
