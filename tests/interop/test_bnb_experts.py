"""Mixtures that transformers writes with bitsandbytes: 5 keeps their experts dense, and Veneer reads them so."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import tiny
from tokens import tokenizer
from veneer.commands.quantize import quantise_to
from veneer.frozen.experts import experts_of, projections
from veneer.frozen.layers import storage_of, without_codes
from veneer.models.load import load

logging.disable(logging.WARNING)  # it warns at its import of GPU kernels that are not here
import bitsandbytes  # noqa: E402

logging.disable(logging.NOTSET)

pytestmark = pytest.mark.interop
IDS = {"input_ids": tiny.batch("llama")["input_ids"]}
# Rows of whole blocks: bitsandbytes 0.50.2 gives others back wrong on a CPU.
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "num_experts": 4,
    "num_local_experts": 4, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "sliding_window": 8,
}  # fmt: skip


def _plain(name, folder):
    kind = type(tiny.build(name))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**SIZES))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _theirs(folder, **how):
    """In the state of training: without it, a CPU with bf16 instructions rounds weights and inputs to bf16."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    model.set_experts_implementation("eager")
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    return model.train()


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_a_mixture_that_transformers_wrote_is_loaded_with_its_codes_and_dense_experts(name, tmp_path):
    how = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    theirs = _theirs(_plain(name, tmp_path / "plain"), quantization_config=how)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    # What it writes: codes of the linear layers alone, and the experts, which are none, dense.
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    assert [key for key in written if "quant_state" in key and "expert" in key] == []
    ours = load(tmp_path / "theirs")[0]
    assert storage_of(ours) == {"storage": "nf4", "block_size": 64, "double_quantisation": False}
    for path, module in theirs.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            assert torch.equal(ours.get_submodule(path).quantised.codes, module.weight.data.flatten())
    for path, module in experts_of(ours).items():
        for projection in projections(module):
            assert torch.equal(getattr(module, projection), getattr(theirs.get_submodule(path), projection))
    assert "are kept dense, not in codes" in without_codes(ours)
    torch.testing.assert_close(tiny.logits(ours, IDS), tiny.logits(theirs, IDS), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_transformers_reads_a_mixture_that_quantize_writes_with_dense_experts(name, tmp_path):
    quantise_to(_plain(name, tmp_path / "plain"), tmp_path / "ours", experts="dense")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    ours = load(tmp_path / "ours")[0]
    torch.testing.assert_close(
        tiny.logits(_theirs(tmp_path / "ours"), IDS), tiny.logits(ours, IDS), rtol=1e-4, atol=2e-5
    )
