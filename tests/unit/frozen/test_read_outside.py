"""Layers whose weight the model reads itself stay dense in every storage, and get no update."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

import tiny
import veneer
from tokens import tokenizer
from veneer.commands.quantize import quantise_to
from veneer.errors import TargetError
from veneer.frozen.layers import dense_linear_layers, linear_layers
from veneer.frozen.read_outside import read_outside
from veneer.frozen.weight import QuantisedLinear
from veneer.models.checkpoint import Checkpoint

pytestmark = pytest.mark.unit

_SIZES = {"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 2}
MODELS = {
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**_SIZES, state_size=8)),
    "falcon_mamba": lambda: tf.FalconMambaForCausalLM(tf.FalconMambaConfig(**_SIZES, state_size=8)),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(
            **_SIZES, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_experts=1,
            attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False,
        )
    ),
}  # fmt: skip
INPUTS = {"input_ids": torch.tensor([[72, 69, 76, 76, 79]]), "labels": torch.tensor([[72, 69, 76, 76, 79]])}


@pytest.fixture(params=list(MODELS))
def folder(request, tmp_path):
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_is_dense_and_the_model_computes_and_learns_in_every_storage(folder):
    plain = tiny.logits(veneer.load(folder)[0], INPUTS)
    for storage, worst in (("nf4", 0.3), ("int8", 0.02), ("bf16", 0.02)):
        checkpoint = Checkpoint(folder)
        model, _ = veneer.load(checkpoint, storage)
        outside = dense_linear_layers(model)
        assert {name.rpartition(".")[2] for name in outside} == {"dt_proj"}
        assert all(type(model.get_submodule(name)) is nn.Linear for name in outside)
        assert float((tiny.logits(model, INPUTS) - plain).norm() / plain.norm()) < worst
        if storage != "bf16":
            assert any(isinstance(module, QuantisedLinear) for module in model.modules())
            assert checkpoint.notes[-1] == (
                f"dt_proj ({len(outside)} layers) is not kept in codes: the model reads its weight itself."
            )
        model = veneer.attach(model, veneer.LoRA(rank=2, targets="all-linear"))
        before = float(model(**INPUTS).loss.detach())
        assert tiny.train_steps(model, INPUTS, steps=8) < before
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert unused == [], "an update of a layer that is never called would learn nothing"


def test_an_update_of_it_is_refused(folder):
    model, _ = veneer.load(folder)
    with pytest.raises(TargetError, match=(
        r"dt_proj is never called: the module around it reads its weight itself, so an update would do nothing; leave "
        r"it out of targets\.$"
    )):  # fmt: skip
        veneer.attach(model, veneer.LoRA(targets=["dt_proj", "x_proj"]))


def test_it_is_written_and_read_again(folder, tmp_path):
    quantise_to(folder, tmp_path / "out")
    ours, _ = veneer.load(tmp_path / "out")
    assert torch.equal(tiny.logits(ours, INPUTS), tiny.logits(veneer.load(folder, "nf4")[0], INPUTS))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "phi3", "bert", "opt"])
def test_others_keep_all_their_layers_in_codes(name):
    """T5 asks for the type of a weight, which is no reading of its values."""
    model = tiny.build(name)
    assert set(linear_layers(model)) & read_outside(model) == set()
    assert dense_linear_layers(model) == []


def test_what_is_only_for_pretraining_does_not_count():
    model = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    assert dense_linear_layers(model) == []


def test_deberta_calls_its_input_projection():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = tf.DebertaForMaskedLM(tf.DebertaConfig(**sizes, num_hidden_layers=1)).eval()
    assert read_outside(model) == set()
    veneer.attach(model, veneer.LoRA(rank=2, targets=["in_proj"]))
    model(**{key: value % 64 for key, value in INPUTS.items()}).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
