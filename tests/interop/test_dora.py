"""DoRA beside the installed peft: the same output and gradients, and files both ways."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import nn

import tiny
import veneer

pytestmark = pytest.mark.interop

_KINDS = [
    ("llama", {}),
    ("llama", {"targets": ["embed_tokens", "lm_head", "v_proj"], "rslora": True, "rank_pattern": {"v_proj": 2}}),
    ("llama-tied", {"targets": ["q_proj", "embed_tokens"]}),
    ("gpt2", {"targets": ["wte", "c_attn"]}),  # weights the other way round, biases
    ("gemma3", {"targets": ["embed_tokens", "q_proj"]}),  # a scaled embedding
    ("bert", {"targets": ["query", "dense"]}),
]


@pytest.mark.parametrize(("name", "options"), _KINDS)
def test_output_gradients_and_files_are_pefts(name, options, tmp_path):
    torch.manual_seed(0)  # another A may leave a gradient of nearly nothing, whose last bits are all that there is
    model, inputs = tiny.build(name), tiny.batch(name)
    veneer.attach(model, veneer.LoRA(rank=4, alpha=6, dora=True, **options))
    tiny.train_steps(model, inputs)
    veneer.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny.build(name), tmp_path / "ours", is_trainable=True).eval()
    expected = tiny.logits(model, inputs)
    torch.testing.assert_close(tiny.logits(theirs, inputs), expected, rtol=0, atol=1e-6)

    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/adapter_config.json").read_text())["use_dora"] is True
    back = tiny.build(name)
    veneer.load_adapter(back, tmp_path / "theirs", trainable=True)
    assert torch.equal(tiny.logits(back, inputs), expected)
    for one in (back, theirs):
        one.zero_grad()
        one(**inputs).loss.backward()
    named = dict(theirs.named_parameters())
    parts = {"A": ("lora_A.default.weight", "lora_embedding_A.default"), "m": ("lora_magnitude_vector.default.weight",)}
    parts["B"] = ("lora_B.default.weight", "lora_embedding_B.default")
    compared = 0
    for own, parameter in back.named_parameters():
        path, _, part = own.partition(".updates.default.")
        if part in parts:
            (grad,) = [
                named[key].grad for ending in parts[part] if (key := f"base_model.model.{path}.{ending}") in named
            ]
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()))
            compared += 1
    assert compared == sum("lora_" in own for own, parameter in named.items() if parameter.requires_grad)


def test_older_keys_of_magnitudes_load(tmp_path):
    """peft has kept them as a parameter and as a module's weight, and some tools write the adapter's name."""
    from safetensors.torch import load_file, save_file

    model, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.attach(model, veneer.LoRA(rank=2, dora=True, targets=["q_proj"]))
    tiny.train_steps(model, inputs)
    veneer.save(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for ending in (".weight", ".default.weight", ".default"):
        renamed = {key.replace("magnitude_vector", f"magnitude_vector{ending}"): t for key, t in tensors.items()}
        save_file(renamed, file)
        fresh = tiny.build("llama")
        veneer.load_adapter(fresh, tmp_path)
        assert torch.equal(tiny.logits(fresh, inputs), tiny.logits(model, inputs))


def test_a_linear_layer_in_training_with_dropout_is_pefts():
    """With the elements that dropout leaves: its mask is drawn in another way."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 5))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 5)), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.5)
    )
    inner = theirs.base_model.model[0]
    inner.base_layer.load_state_dict(layer[0].state_dict())
    veneer.attach(layer, veneer.LoRA(rank=2, alpha=8, dora=True, targets=["0"], dropout=0.5))
    update = layer[0].updates["default"]
    with torch.no_grad():
        nn.init.normal_(update.B)
        update.m.mul_(1.3)
        inner.lora_A["default"].weight.copy_(update.A)
        inner.lora_B["default"].weight.copy_(update.B)
        inner.lora_magnitude_vector["default"].weight.copy_(update.m)
    x, kept = torch.ones(4, 6), []

    class Recorded(nn.Module):
        def forward(self, x):
            mask = veneer.updates.product.mask_of(x, 0.5, 7)
            kept.append(mask)
            return x * mask

    inner.lora_dropout["default"] = Recorded()
    y = layer[0](x, draw=lambda: 7)
    torch.testing.assert_close(y, theirs(x), rtol=0, atol=1e-5)
    assert kept
    assert not torch.allclose(y, layer.eval()(x))
