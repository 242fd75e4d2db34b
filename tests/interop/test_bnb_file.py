"""bitsandbytes 4-bit checkpoints: transformers loads ours, Veneer loads theirs, and both compute the same."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import tiny
from tokens import tokenizer
from veneer.commands.quantize import quantise_to
from veneer.frozen.blockwise import dense
from veneer.frozen.layers import storage_of
from veneer.frozen.weight import QuantisedLinear
from veneer.models.load import load

logging.disable(logging.WARNING)  # it warns at its import of GPU kernels that are not here
import bitsandbytes  # noqa: E402

logging.disable(logging.NOTSET)

pytestmark = pytest.mark.interop

IDS = torch.tensor([[72, 69, 76, 76, 79]])
PREFIX = "model.layers.0.mlp.up_proj.weight"
# Rows of whole blocks: bitsandbytes 0.50.2 gives others back wrong on a CPU.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def _models():
    words = len(tokenizer())
    llama = {"vocab_size": words, "num_key_value_heads": 2, "max_position_embeddings": 64, **SIZES}
    gpt2 = {"vocab_size": words, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    return {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**llama, attention_bias=True)),
        "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**llama, tie_word_embeddings=True)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2)),
        "gptneox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(vocab_size=words, **SIZES, hidden_dropout=0.0)),
    }


@pytest.fixture(scope="module", params=list(_models()))
def base(request, tmp_path_factory):
    return _folder(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return _folder("llama", tmp_path_factory)


def _folder(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _models()[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _quantised(source, out, **options):
    quantise_to(str(source), out, **options)
    return out


def _theirs(folder, **how):
    """With transformers and bitsandbytes, in the state of training: without it, a CPU with bf16 instructions rounds
    weights and inputs to bf16, whatever type was asked for. There is no dropout."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    return model.train()


def _config(storage, nested):
    return tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=storage, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(("storage", "block_size", "nested"), [
    ("nf4", 64, True), ("nf4", 64, False), ("fp4", 64, True), ("fp4", 128, False), ("nf4", 32, True),
])  # fmt: skip
def test_transformers_loads_what_quantize_writes_and_gives_the_same_logits(base, storage, block_size, nested, tmp_path):
    out = _quantised(base, tmp_path / "out", storage=storage, block_size=block_size, double_quantisation=nested)
    ours, read = load(out)
    assert storage_of(ours) == {"storage": storage, "block_size": block_size, "double_quantisation": nested}
    assert read("hello").input_ids == tokenizer()("hello").input_ids
    # The same numbers are summed in another order: fp32's own rounding.
    torch.testing.assert_close(tiny.logits(_theirs(out), {"input_ids": IDS}), tiny.logits(ours, {"input_ids": IDS}),
                               rtol=1e-4, atol=2e-5)  # fmt: skip
    direct, _ = load(base, storage, block_size=block_size, double_quantisation=nested)
    assert torch.equal(tiny.logits(ours, {"input_ids": IDS}), tiny.logits(direct, {"input_ids": IDS}))


@pytest.mark.parametrize(("storage", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_what_transformers_wrote_is_loaded_with_its_own_codes_and_scales(base, storage, nested, tmp_path):
    theirs = _theirs(base, quantization_config=_config(storage, nested))
    theirs.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    ours, _ = load(tmp_path)
    assert storage_of(ours) == {"storage": storage, "block_size": 64, "double_quantisation": nested}
    for name, module in theirs.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            q = ours.get_submodule(name).quantised
            assert torch.equal(q.codes, module.weight.data.flatten())
            assert torch.equal(q.scales, module.weight.quant_state.absmax)
            wanted = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            torch.testing.assert_close(dense(q), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(tiny.logits(theirs, {"input_ids": IDS}), tiny.logits(ours, {"input_ids": IDS}),
                               rtol=1e-4, atol=2e-5)  # fmt: skip


def test_the_files_are_theirs_key_by_key_and_byte_by_byte(base, tmp_path):
    """But for the scales' 8-bit codes, which theirs rounds through a table; so here without double quantisation."""
    ours = _quantised(base, tmp_path / "ours", double_quantisation=False)
    model = _theirs(base, quantization_config=_config("nf4", False))
    model.save_pretrained(tmp_path / "theirs")
    a, b = load_file(ours / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    if "embed_out.weight" in b:  # transformers reads either name of GPT-NeoX's head
        b["lm_head.weight"] = b.pop("embed_out.weight")
    assert {k: (t.dtype, t.shape) for k, t in a.items() if "quant_state" not in k} == {
        k: (t.dtype, t.shape) for k, t in b.items() if "quant_state" not in k
    }
    for key, tensor in a.items():
        if "quant_state" in key:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(b[key].tolist())), key
        else:
            assert torch.equal(tensor, b[key]), key
    said = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (ours, tmp_path / "theirs")]
    assert said[0] == said[1]
    nested = load_file(_quantised(base, tmp_path / "nested") / "model.safetensors")
    model = _theirs(base, quantization_config=_config("nf4", True))
    model.save_pretrained(tmp_path / "theirs-nested")
    wanted = load_file(tmp_path / "theirs-nested" / "model.safetensors")
    if "embed_out.weight" in wanted:
        wanted["lm_head.weight"] = wanted.pop("embed_out.weight")
    assert {k: (t.dtype, t.shape) for k, t in nested.items() if "quant_state" not in k} == {
        k: (t.dtype, t.shape) for k, t in wanted.items() if "quant_state" not in k
    }


def test_a_half_precision_model_stays_half_in_what_is_not_quantised(llama, tmp_path):
    model, made = tf.AutoModelForCausalLM.from_pretrained(llama), tokenizer()
    model.bfloat16().save_pretrained(tmp_path / "half")
    made.save_pretrained(tmp_path / "half")
    out = _quantised(tmp_path / "half", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    ours, _ = load(out)
    assert ours.lm_head.weight.dtype == torch.float32
    # The head is in bf16 in the file, and transformers multiplies the codes in what it was asked for.
    wanted = tiny.logits(_theirs(out), {"input_ids": IDS}).float()
    assert ((tiny.logits(ours, {"input_ids": IDS}) - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_codes_are_the_mapped_file(llama, tmp_path):
    out = _quantised(llama, tmp_path / "out")
    model, _ = load(out)
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split() for line in lines if str(out / "model.safetensors") in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            assert any(low <= module.codes.data_ptr() < high for low, high in ranges)
    assert any(low <= model.lm_head.weight.data_ptr() < high for low, high in ranges)
