"""A model that transformers loaded with BitsAndBytesConfig, moved into Veneer's storage: the same values."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf

import tiny
import veneer
from veneer.errors import ModelError, TargetError

logging.disable(logging.WARNING)  # it warns at its import of GPU kernels that are not here
from bitsandbytes import functional  # noqa: E402

logging.disable(logging.NOTSET)

pytestmark = pytest.mark.interop

INPUTS = tiny.batch("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("plain")
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, attention_bias=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.LlamaForCausalLM(config).save_pretrained(where)
    return where


def _loaded(folder, dtype=torch.float32, **options):
    kept = tf.BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **options)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=kept, device_map="cpu", dtype=dtype)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "nested", "dtype"),
    [("nf4", True, torch.float32), ("fp4", False, torch.bfloat16), ("nf4", False, torch.float16)],
)  # fmt: skip
def test_the_codes_stand_for_the_same_values_and_the_model_trains(folder, kind, nested, dtype, tmp_path):
    model = _loaded(folder, dtype, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
    theirs = {
        name: functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert veneer.from_bitsandbytes(model) is model
    assert len(theirs) == 14
    for name, weight in theirs.items():
        assert torch.equal(model.get_submodule(name).frozen().dense().to(dtype), weight)
    assert not hasattr(model.config, "quantization_config")
    logits = tiny.logits(model, INPUTS)
    again = _loaded(folder, dtype, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
    torch.testing.assert_close(tiny.logits(again, INPUTS), logits, rtol=0.03, atol=0.03)  # theirs has scales of bf16
    veneer.attach(model, veneer.LoRA(rank=4))
    tiny.train_steps(model, INPUTS)
    adapted = tiny.logits(model, INPUTS)
    veneer.merge(model, reversible=False)
    model.save_pretrained(tmp_path)
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(tiny.logits(merged, INPUTS), adapted, rtol=0.02, atol=0.02)


def test_attach_says_how_to_move_such_a_model(folder):
    model = _loaded(folder, load_in_4bit=True)
    with pytest.raises(TargetError, match=r"q_proj is a Linear4bit of bitsandbytes; veneer.from_bitsandbytes\(model\)"):
        veneer.attach(model, veneer.LoRA())


def test_scales_that_bitsandbytes_rounded_are_refused(folder):
    model = _loaded(folder, load_in_4bit=True)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True  # as where a CPU has bf16
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj has other scales .* move it before it is called"):
        veneer.from_bitsandbytes(model)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_eight_bits_are_another_format(folder):
    model = _loaded(folder, load_in_8bit=True)
    with pytest.raises(ModelError, match=r'q_proj is kept by bitsandbytes in 8 bits.*storage="int8"'):
        veneer.from_bitsandbytes(model)
    with pytest.raises(TargetError, match=r'Linear8bitLt of bitsandbytes in 8 bits.*storage="int8"'):
        veneer.attach(model, veneer.LoRA())
    with pytest.raises(ModelError, match="this model has none"):
        veneer.from_bitsandbytes(tiny.build("llama"))
