"""Checkpoints in forms of other tools: named, and refused; or read as they are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import veneer
from tokens import tokenizer
from veneer.errors import ModelError
from veneer.models.checkpoint import Checkpoint

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "AWQ"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, r"NVIDIA ModelOpt \(FP8 or"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"quant_method": "new-thing"}}, "a form called 'new-thing'"),
        ({"quantization_config": {"bits": 4}}, "a form that it has no name for"),
    ],
)
def test_a_form_that_cannot_be_read_is_named(said, what, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    for call in (veneer.load, lambda path: Checkpoint(path).config, lambda path: veneer.load(path, storage="nf4")):
        with pytest.raises(ModelError, match=rf"^The weights of .*model are kept in {what}.*; what can: plain weights"):
            call(str(folder))


def _fp8(folder, hidden):
    """A Llama whose layers are kept in FP8 by blocks of 128 × 128, and the weights that these stand for."""
    made = tokenizer()
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(made), hidden_size=hidden, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, eos_token_id=made.eos_token_id,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    meant = dict(tensors)
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        rows, columns = tensors[key].shape
        scales = torch.rand(-(-rows // 128), -(-columns // 128)) * 1e-3 + 1e-4
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        codes = (tensors[key] / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors |= {key: codes, f"{key}_scale_inv": scales}
        meant[key] = codes.float() * wide
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))
    return meant


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_fp8_by_blocks_is_expanded(storage, tmp_path):
    meant = _fp8(tmp_path / "fp8", 128)
    model, _ = veneer.load(tmp_path / "fp8", storage=storage)
    plain = tf.LlamaForCausalLM(tf.LlamaConfig(**{**model.config.to_dict(), "quantization_config": None})).eval()
    plain.load_state_dict(meant)
    if storage == "nf4":
        (tmp_path / "plain").mkdir()
        plain.save_pretrained(tmp_path / "plain")
        tokenizer().save_pretrained(tmp_path / "plain")
        plain, _ = veneer.load(tmp_path / "plain", storage=storage)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=2e-2, atol=2e-2)


def test_fp8_whose_weights_end_within_a_block_is_refused(tmp_path):
    _fp8(tmp_path / "fp8", 192)
    with pytest.raises(ModelError, match=r"_proj\.weight of .* is \d+ × \d+ in FP8 by blocks of 128 × 128"):
        veneer.load(tmp_path / "fp8")


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_pointer_in_place_of_a_file_is_said(storage, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelError, match=r"model\.safetensors of .*model is a Git LFS pointer.*; run git lfs pull"):
        veneer.load(folder, storage=storage)
