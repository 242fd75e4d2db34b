"""What hangs on a base's call is not passed by: hooks, accelerate's offloading, torch's fast path."""

from __future__ import annotations

import accelerate
import pytest
import torch
import transformers as tf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

import tiny
import veneer
from veneer.errors import ModelError, TargetError
from veneer.frozen.called import only_multiplies
from veneer.training.fused import fused_passes

pytestmark = pytest.mark.unit

BATCH = tiny.batch("llama")


def _fill(model):
    """Random updates, the same each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".updates." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _gradients(model):
    model(**BATCH).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def plain():
    """An adapted model without anything on its modules, its logits and its gradients."""
    model = _fill(veneer.attach(tiny.build("llama"), veneer.LoRA(rank=4)))
    return tiny.logits(model, BATCH), _gradients(model)


def _close(model, plain):
    torch.testing.assert_close(tiny.logits(model, BATCH), plain[0], rtol=0, atol=2e-5)


@pytest.fixture
def offloaded(tmp_path):
    """A model of which accelerate keeps the second layer in files."""
    tiny.build("llama").save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    folder = tmp_path / "offloaded"
    return tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=folder).eval()


def test_an_offloaded_base_is_called_and_trains(offloaded, plain, tmp_path):
    base = tiny.logits(offloaded, BATCH)
    veneer.attach(offloaded, veneer.LoRA(rank=4))
    layer = offloaded.model.layers[1].self_attn.q_proj
    assert layer.base.weight.is_meta
    assert {parameter.device.type for parameter in layer.updates.parameters()} == {"cpu"}
    assert torch.equal(tiny.logits(offloaded, BATCH), base)
    _fill(offloaded)
    _close(offloaded, plain)
    for name, gradient in _gradients(offloaded).items():
        torch.testing.assert_close(gradient, plain[1][name], rtol=1e-4, atol=2e-5)
    veneer.save(offloaded, tmp_path / "adapter")
    other = tiny.build("llama")
    veneer.load_adapter(other, tmp_path / "adapter")
    _close(other, plain)
    with pytest.raises(ModelError, match=r"layers.1.self_attn.q_proj and 6 more cannot be merged: accelerate offloads"):
        veneer.merge(offloaded)
    _close(offloaded, plain)


@pytest.mark.parametrize("options", [{"init": "loftq"}, {"train_also": ["layers.1.input_layernorm"]}])
def test_what_would_read_an_offloaded_weight_is_refused(offloaded, options):
    with pytest.raises(ModelError, match=r"layers.1.* cannot be read by attach: accelerate offloads it"):
        veneer.attach(offloaded, veneer.LoRA(**options))
    assert all(parameter.requires_grad for parameter in offloaded.parameters())


def test_a_model_offloaded_before_or_after_attach_computes_the_same(plain, tmp_path):
    after = _fill(veneer.attach(tiny.build("llama"), veneer.LoRA(rank=4)))
    accelerate.cpu_offload(after, execution_device="cpu")
    _close(after, plain)
    with pytest.raises(ModelError, match=r"q_proj.updates.default and 13 more cannot be saved"):
        veneer.save(after, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    before = tiny.build("llama")
    accelerate.cpu_offload(before, execution_device="cpu")
    _close(_fill(veneer.attach(before, veneer.LoRA(rank=4))), plain)


def test_a_merged_module_has_the_hooks_of_accelerate_on_its_own_forward(plain):
    model = tiny.build("llama")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook("cpu"))
    _fill(veneer.attach(model, veneer.LoRA(rank=4)))
    _close(model, plain)
    veneer.merge(model)
    assert hasattr(model.model.layers[0].mlp.up_proj, "_hf_hook")
    _close(model, plain)
    veneer.unmerge(model)
    _close(model, plain)


def test_a_forward_that_somebody_replaced_is_called_and_not_merged(plain):
    model = tiny.build("llama")
    linear = model.model.layers[0].mlp.up_proj
    own, calls = linear.forward, []
    linear.forward = lambda x: calls.append(1) or own(x)
    _fill(veneer.attach(model, veneer.LoRA(rank=4)))
    _close(model, plain)
    assert len(calls) == 1
    with pytest.raises(TargetError, match=r"layers.0.mlp.up_proj cannot be merged: its forward was replaced"):
        veneer.merge(model)
    del linear.forward
    veneer.merge(model)
    _close(model, plain)


def test_plain_bases_are_not_called_while_a_run_trains_them_either():
    model = veneer.attach(tiny.build("llama"), veneer.LoRA(rank=4))
    base, x = model.model.layers[0].mlp.up_proj.base, torch.zeros(1, 32)
    assert only_multiplies(base, x)
    with fused_passes(model):
        assert "forward" in base.__dict__
        assert only_multiplies(base, x)
    handle = base.register_forward_hook(lambda module, arguments, output: None)
    assert not only_multiplies(base, x)
    handle.remove()
    assert only_multiplies(base, x)


class Encoder(nn.Module):
    """A model of torch's own encoder layers, which in eval mode have a fast path around their linear layers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(32, 5)

    def forward(self, x, mask=None):
        return self.out(self.encoder(x, src_key_padding_mask=mask))


@pytest.mark.parametrize("padded", [False, True])
def test_torch_s_encoder_layers_call_what_is_adapted_in_them(padded):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Encoder().eval(), torch.randn(3, 6, 32)
    mask = torch.arange(6).expand(3, 6) >= torch.tensor([[4], [6], [6]]) if padded else None
    rows = torch.ones(3, 6, dtype=torch.bool) if mask is None else ~mask

    @torch.no_grad()
    def answers():
        return model(x, mask)[rows]

    base = answers()
    veneer.attach(model, veneer.LoRA(rank=4, targets=["linear1", "linear2"]))
    torch.testing.assert_close(answers(), base, rtol=0, atol=2e-6)
    adapted = _fill(model) and answers()
    assert (adapted - base).abs().max() > 0.1, "also in eval mode"
    model.train()
    torch.testing.assert_close(answers(), adapted, rtol=0, atol=1e-5)
    model.eval()
    veneer.merge(model)
    torch.testing.assert_close(answers(), adapted, rtol=0, atol=1e-5)
    veneer.unmerge(model)
    assert torch.equal(answers(), adapted)
    veneer.remove(model)
    assert torch.equal(answers(), base), "and the fast path is back"
