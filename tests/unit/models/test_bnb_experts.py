"""A mixture's experts in bitsandbytes' keys: written and read again, as transformers 5 writes them, and 4."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from tokens import tokenizer
from veneer.commands.quantize import quantise_to
from veneer.errors import ModelError
from veneer.frozen.experts import Experts, QuantisedStack, experts_of, projections
from veneer.frozen.weight import QuantisedLinear
from veneer.models.bnb_file import weight_tensors
from veneer.models.load import load

pytestmark = pytest.mark.unit
IDS = {"input_ids": tiny.batch("llama")["input_ids"] % 20}


def _folder(path, name):
    tiny.build(name).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def _same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    assert [key for key, tensor in a.state_dict().items() if not torch.equal(tensor, b.state_dict()[key])] == []
    assert torch.equal(tiny.logits(a, IDS), tiny.logits(b, IDS))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_a_mixture_that_quantize_writes_is_read_as_it_was_quantised(name, double, tmp_path):
    source = _folder(tmp_path / "plain", name)
    quantise_to(source, tmp_path / "coded", double_quantisation=double)
    _same(load(source, "nf4", double_quantisation=double)[0], load(tmp_path / "coded")[0])


def test_dense_experts_are_written_as_transformers_does(tmp_path):
    source = _folder(tmp_path / "plain", "qwen3-moe")
    quantise_to(source, tmp_path / "coded", experts="dense")
    model = load(tmp_path / "coded")[0]
    assert not any(isinstance(module, Experts) for module in model.modules())
    plain = load(source)[0]
    for path, module in experts_of(model).items():
        for projection in projections(module):
            assert torch.equal(getattr(module, projection), getattr(plain.get_submodule(path), projection))
    _same(load(source, "nf4", experts=False)[0], model)


def _one_by_one(folder, block_size, keep=lambda key: True):
    """A checkpoint of experts as transformers 4 wrote them: each matrix of each in codes of its own."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors, made = {}, load_file(folder / "model.safetensors")
    for key, tensor in made.items():
        if ".experts." in key and keep(key):
            linear = nn.Linear(*tensor.shape[::-1], bias=False)
            linear.weight = nn.Parameter(tensor)
            layer = QuantisedLinear.of(linear, storage="nf4", block_size=block_size)
            parts = weight_tensors(layer, key, torch.float32)
            tensors |= {name: part.clone() for name, part in parts.items()}
            made[key] = layer.frozen().dense()
        else:
            tensors[key] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return made


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_in_codes_one_by_one_are_joined_exactly(name, tmp_path):
    made = _one_by_one(_folder(tmp_path / "coded", name), 64)
    save_file(made, _folder(tmp_path / "plain", name) / "model.safetensors", {"format": "pt"})
    ours, wanted = load(tmp_path / "coded")[0], load(tmp_path / "plain")[0]
    assert sum(isinstance(module, QuantisedStack) for module in ours.modules()) == 4
    for path, module in experts_of(ours).items():
        for projection in projections(module):
            dense = getattr(wanted.get_submodule(path), projection)
            assert torch.equal(getattr(module, projection).dense(), dense), path
    assert torch.allclose(tiny.logits(ours, IDS), tiny.logits(wanted, IDS), rtol=0, atol=1e-6)


def test_parts_that_do_not_fit_together_are_refused(tmp_path):
    folder = _folder(tmp_path / "coded", "qwen3-moe")  # gate and up of 48 · 32 weights: one and a half blocks
    _one_by_one(folder, 1024)
    with pytest.raises(ModelError, match=r"gate_up_proj are kept in codes of several kinds, or in blocks that cannot"):
        load(folder)


def test_damaged_experts_are_refused(tmp_path):
    source = _folder(tmp_path / "plain", "qwen3-moe")
    quantise_to(source, tmp_path / "coded")
    file, key = tmp_path / "coded" / "model.safetensors", "model.layers.0.mlp.experts.down_proj"
    tensors = load_file(file)
    save_file({**tensors, f"{key}.absmax": tensors[f"{key}.absmax"][:3].clone()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"down_proj\.absmax has 3 rows where there are 4 experts"):
        load(tmp_path / "coded")
    short = {
        name: part[:3].clone() if name.startswith(key) and len(part) == 4 else part for name, part in tensors.items()
    }
    state = json.loads(bytes(tensors[f"{key}.quant_state.bitsandbytes__nf4"].tolist())) | {"shape": [3, 32, 48]}
    short[f"{key}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(short, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"is \(3, 32, 48\), where its config\.json says \(4, 32, 48\)"):
        load(tmp_path / "coded")
