"""Training with fused passes is training with the model's own."""

from __future__ import annotations

import pytest
import torch

import tiny
import veneer
from veneer.training.fused import fused_passes

pytestmark = pytest.mark.unit


def _fused(model):
    return {type(module).__name__ for module in model.modules() if "forward" in module.__dict__}


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP", "Linear"}),
        ("mistral", {"MistralRMSNorm", "MistralMLP", "Linear"}),
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP", "Linear"}),
        ("gemma", {"GemmaRMSNorm", "GemmaMLP", "GELUTanh", "Linear"}),
        ("gemma3", {"Gemma3RMSNorm", "Gemma3MLP", "GELUTanh", "Linear"}),
        ("phi", {"LayerNorm", "NewGELUActivation", "Linear"}),
        ("phi3", {"Phi3RMSNorm", "Phi3MLP", "Linear"}),
        ("gpt2", {"LayerNorm", "NewGELUActivation", "Linear"}),
        ("gptneox", {"LayerNorm", "Linear"}),
        ("bert", {"LayerNorm", "Linear"}),
    ],
)
def test_logits_and_gradients_are_equal_but_for_rounding(name, types):
    model = tiny.build(name)
    veneer.attach(model, veneer.LoRA(rank=2))
    tiny.train_steps(model, tiny.batch(name), steps=1)
    found = []

    def look():
        model.zero_grad()
        output = model(**tiny.batch(name))
        output.loss.backward()
        found.append((output.logits.detach(), [p.grad for p in model.parameters() if p.requires_grad]))

    look()
    with fused_passes(model):
        assert _fused(model) == types
        look()
    assert _fused(model) == set()
    look()
    assert torch.equal(found.pop()[0], found[0][0]), "the model's own last bits are back"
    (plain_logits, plain), (logits, grads) = found
    torch.testing.assert_close(logits, plain_logits, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(grads, plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gemma", "phi3", "gpt2"])
def test_in_bf16_nothing_is_another(name):
    """There every operation rounds, and a formula in fewer of them would give other numbers."""
    model = tiny.build(name).bfloat16()
    plain = tiny.logits(model, tiny.batch(name))
    for module in model.modules():
        if type(module) is torch.nn.Linear:  # whose product is another library's inside
            module.forward = module.forward
    with fused_passes(model):
        assert torch.equal(tiny.logits(model, tiny.batch(name)), plain)


def test_a_layer_norm_without_weights_and_a_trained_one():
    plain, trained = torch.nn.LayerNorm(8, elementwise_affine=False), torch.nn.LayerNorm(8)
    model, x = torch.nn.Sequential(plain, trained), torch.randn(3, 8, requires_grad=True)
    wanted = model(x)
    with fused_passes(model):
        assert _fused(model) == {"LayerNorm"}
        assert "forward" not in trained.__dict__
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2"])
def test_less_is_kept_for_the_backward_pass(name):
    model = tiny.build(name)
    veneer.attach(model, veneer.LoRA(rank=2))
    inputs = tiny.batch(name, rows=4, length=16)

    def kept():
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = model(**inputs).loss
        assert loss.requires_grad
        return sum(event.self_cpu_memory_usage for event in profile.key_averages())

    plain = kept()
    with fused_passes(model):
        assert kept() < 0.9 * plain


def test_a_trained_norm_a_trained_head_and_another_gate_keep_their_own_forward():
    model = tiny.build("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    veneer.attach(model, veneer.LoRA(rank=2, train_also=["model.norm", "lm_head"]))
    with fused_passes(model):
        assert "forward" not in model.model.layers[0].mlp.__dict__
        assert "forward" in model.model.layers[1].mlp.__dict__
        assert "forward" not in model.model.norm.updates["default"].__dict__
        assert "forward" not in model.lm_head.updates["default"].__dict__
