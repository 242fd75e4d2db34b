"""Training with fused passes is training with the model's own."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import tiny
import veneer
from veneer.kernels.operations.rotation import differentiable_rotate as rotate
from veneer.training import fused
from veneer.training.fused import fused_passes

pytestmark = pytest.mark.unit


def _fused(model):
    return {type(module).__name__ for module in model.modules() if "forward" in module.__dict__}


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "AdaptedLinear", "Linear"}),
        ("mistral", {"MistralRMSNorm", "MistralMLP", "MistralAttention", "AdaptedLinear", "Linear"}),
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention", "AdaptedLinear", "Linear"}),
        ("gemma", {"GemmaRMSNorm", "GemmaMLP", "GELUTanh", "GemmaAttention", "AdaptedLinear", "Linear"}),
        ("gemma3", {"Gemma3RMSNorm", "Gemma3MLP", "GELUTanh", "Gemma3Attention", "AdaptedLinear", "Linear"}),
        ("phi", {"LayerNorm", "NewGELUActivation", "PhiAttention", "AdaptedLinear", "Linear"}),
        ("phi3", {"Phi3RMSNorm", "Phi3MLP", "Phi3Attention", "AdaptedLinear", "Linear"}),
        ("gpt2", {"LayerNorm", "NewGELUActivation", "AdaptedLinear", "Linear"}),
        ("gptneox", {"LayerNorm", "GPTNeoXAttention", "AdaptedLinear", "Linear"}),
        ("bert", {"LayerNorm", "AdaptedLinear", "Linear"}),
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


def _wide(name):
    """A model whose products have other last bits by oneDNN than by F.linear, as sums of more than 384 terms have."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WIDE[name]().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        veneer.attach(model, veneer.LoRA(rank=2))
        tiny.train_steps(model, tiny.batch(name), steps=1)
    return model


_SIZES = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
WIDE = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_SIZES, num_key_value_heads=2, head_dim=128)),
    "gptneox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=512, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_while_one_model_trains_another_computes_as_before(name):
    trained, other, inputs = _wide(name), _wide(name), tiny.batch(name, rows=4, length=24)
    base = tiny.build(name)
    before, of_base = tiny.logits(other, inputs), tiny.logits(base, inputs)
    within = []

    def look(*_):
        within.append((tiny.logits(other, inputs), tiny.logits(base, inputs)))

    trained.get_output_embeddings().register_forward_hook(look)
    with fused_passes(trained):
        look()
        output = trained(**inputs)
        output.loss.backward()
        look()
        assert not torch.equal(output.logits, before), "its own last bits are others, or this test sees nothing"
    assert len(within) == 3
    for logits, logits_of_base in within:
        assert torch.equal(logits, before)
        assert torch.equal(logits_of_base, of_base)


@pytest.mark.parametrize("name", ["llama", "gemma", "gptneox", "phi3"])
def test_the_attention_of_the_trained_model_alone_rotates_in_one_pass(name, monkeypatch):
    rotations = []
    monkeypatch.setattr(fused, "rotate", lambda x, *angles: rotations.append(1) or rotate(x, *angles))
    trained, other, inputs = tiny.build(name), tiny.build(name), tiny.batch(name)
    with fused_passes(trained):
        tiny.logits(other, inputs)
        assert not rotations
        tiny.logits(trained, inputs)
    assert len(rotations) == 2 * 2, "queries and keys of two layers"


@pytest.mark.parametrize("name", WIDE)
def test_two_models_that_train_in_turn_become_what_each_becomes_alone(name):
    def steps(seed):
        """A model in training: a generator of its steps, which gives what it has learned."""
        model, inputs = _wide(name), tiny.batch(name, rows=4, length=24, seed=seed)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=0.02)
        with fused_passes(model):
            for _ in range(3):
                optimizer.zero_grad()
                model(**inputs).loss.backward()
                optimizer.step()
                yield learned

    def alone(seed):
        *_, learned = steps(seed)
        return learned

    *_, (one, two) = zip(steps(0), steps(1), strict=True)
    for together, seed in ((one, 0), (two, 1)):
        for parameter, wanted in zip(together, alone(seed), strict=True):
            assert torch.equal(parameter, wanted)


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
