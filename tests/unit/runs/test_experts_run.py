"""A run on a mixture: what is printed of its experts, what is resumed, planned and merged."""

from __future__ import annotations

import io

import pytest
import torch
import transformers as tf
from rich.console import Console

import tiny
import veneer
from tokens import tokenizer
from veneer.commands.merge import merge_to
from veneer.commands.quantize import quantise_to
from veneer.frozen.experts import QuantisedStack
from veneer.models.load import load

pytestmark = pytest.mark.unit
INPUTS = {"input_ids": torch.tensor([[72, 69, 76]])}
LEFT = "parameters of experts.gate_up_proj, experts.down_proj are"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("mixture"), tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {**tiny._EXPERTS, "vocab_size": len(made), "max_position_embeddings": 128}
        config = tf.Qwen3MoeConfig(num_experts=4, moe_intermediate_size=48, head_dim=8, **sizes)
        tf.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def _train(mixture, rows_file, output, **more):
    console = Console(file=io.StringIO(), width=200)
    result = veneer.train(
        model=str(mixture), data=str(rows_file), output=str(output), steps=4, rank=2, batch_size=4, held_out=8,
        learning_rate=1e-2, console=console, **more,
    )  # fmt: skip
    return result, console.file.getvalue()


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_run_says_what_of_the_experts_it_trains(mixture, rows_file, tmp_path, storage, veneer_command):
    shown = _train(mixture, rows_file, tmp_path / "left", storage=storage)[1]
    assert f"36,864 {LEFT} not adapted; to adapt them, name them in target_parameters." in shown
    both = ["experts.gate_up_proj", "experts.down_proj"]
    result, shown = _train(mixture, rows_file, tmp_path / "run", storage=storage, target_parameters=both)
    assert "not adapted" not in shown
    assert result.loss_after < result.loss_before
    shown = veneer_command("inspect", result.folder / "adapter").out
    assert shown.splitlines()[-3].split() == [
        "layer",
        "down_proj",
        "gate_up_proj",
        *(f"{part}_proj" for part in "koqv"),
    ]
    assert shown.splitlines()[-1].split() == ["1", *["2"] * 6]
    asked = ["--storage", storage, "--target-parameters", ",".join(both), "--batch-size", "1", "--max-length", "16"]
    assert veneer_command("plan", mixture, *asked).code == 0
    model, made = veneer.load(result.folder / "adapter")
    assert "mlp.experts.down_proj" in str(veneer.trainable(veneer.attach(model, veneer.LoRA(targets=both), "more")))
    veneer.remove(model, "more")
    assert len(veneer.generate(model, made, ["bet:", "a"], max_new_tokens=3)) == 2


def test_a_checkpoint_of_dense_experts_is_said_to_be_one(mixture, rows_file, tmp_path, veneer_command):
    done = veneer_command("quantize", mixture, tmp_path / "coded", "--experts", "dense")
    assert done.out.splitlines()[0] == f"36,864 {LEFT} kept dense, not in codes."
    shown = _train(tmp_path / "coded", rows_file, tmp_path / "run")[1]
    assert f"36,864 {LEFT} kept dense, not in codes." in shown
    assert quantise_to(mixture, tmp_path / "codes") is None


@pytest.mark.parametrize("experts", ["codes", "dense"])
def test_a_merge_into_4_bits_has_its_experts_as_it_was_asked(mixture, rows_file, tmp_path, experts):
    result = _train(mixture, rows_file, tmp_path / "run", target_parameters=["experts.down_proj"])[0]
    moved = merge_to(result.folder, tmp_path / "merged", storage="nf4", experts=experts).moved
    assert moved.rows == 8
    assert moved.kl > 0
    read = load(tmp_path / "merged")[0]
    coded = [module for module in read.modules() if isinstance(module, QuantisedStack)]
    assert len(coded) == (4 if experts == "codes" else 0)
    whole = veneer.load(result.folder)[0]
    veneer.merge(whole, reversible=False)
    whole.save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    direct = load(tmp_path / "plain", "nf4", experts=experts == "codes")[0]
    # Dense stacks of the one lie in a mapped file, aligned otherwise than the other's, which products can see.
    torch.testing.assert_close(tiny.logits(read, INPUTS), tiny.logits(direct, INPUTS), rtol=0, atol=1e-6)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
