"""The decoder gives the logits of the model's own forward pass, whatever its weights are kept in."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers as tf

import veneer
from tokens import tokenizer
from veneer.data.labels import Renderer
from veneer.frozen.layers import quantise_linear_layers
from veneer.generation import decoder as module
from veneer.generation.decoder import Decoder, Unsupported
from veneer.generation.generate import continuations
from veneer.generation.stream import pieces
from veneer.kernels.backends import backend_of, cpu, serve
from veneer.kernels.extension import VARIANTS

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not VARIANTS, reason="the C++ kernels were not built"),
]
KINDS = {
    "llama": (tf.LlamaConfig, {}),
    "llama, rotations stretched": (
        tf.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "mistral": (tf.MistralConfig, {"sliding_window": None}),
    "qwen2, which has biases": (tf.Qwen2Config, {}),
    "qwen3, which norms queries and keys": (tf.Qwen3Config, {"head_dim": 48}),
}
VOCABULARY = 67
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]  # read by steps
LONG = [[*range(1, 18)], [12], [13, 14, 15]]  # by the model


def _model(kind="llama", tied=True):
    config, more = KINDS[kind]
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    model = tf.AutoModelForCausalLM.from_config(config(**sizes, **heads, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms that are not 1 and biases that are not 0 play their part
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _agrees(model, prompts, tolerance=2e-5, steps=4):
    """The decoder's logits after each token against a pass over the whole sequence."""
    sequences = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        decoder = Decoder(model, len(prompts), 32)
        found = decoder.read(prompts)
        for step in range(steps):
            for logits, sequence in zip(found, sequences, strict=True):
                wanted = model(torch.tensor([sequence])).logits[0, -1]
                assert (logits - wanted).abs().max() <= tolerance * wanted.abs().max()
                sequence.append(int(wanted.argmax()) if step % 2 else 3 * step + 1)
            found = decoder.step([sequence[-1] for sequence in sequences], list(range(len(sequences))))


@pytest.fixture(params=[*VARIANTS])
def variant(request):
    before = backend_of("cpu")
    serve("cpu", cpu.Cpu(request.param))
    yield request.param
    serve("cpu", before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_of_each_kind_of_model(kind, tied, variant):
    _agrees(_model(kind, tied), PROMPTS)
    _agrees(_model(kind, tied), LONG)


@pytest.mark.parametrize("storage", ["nf4", "int4", "int8"])
def test_over_a_quantised_base(storage, variant):
    model = _model()
    quantise_linear_layers(model, storage=storage)
    _agrees(model, PROMPTS)


def test_of_more_sequences_than_a_product_takes():
    _agrees(_model(), [[i + 1, i + 2][: 1 + i % 2] for i in range(19)])


def test_with_adapters(variant):
    model = _model("qwen2, which has biases")
    veneer.attach(model, veneer.LoRA(rank=3, targets="all-linear"), name="first")
    veneer.attach(model, veneer.AdaLoRA(initial_rank=3, target_rank=2, total_steps=10), name="second")
    base = _model("qwen2, which has biases")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for active in (["first"], ["second"], ["first", "second"]):
        veneer.activate(model, *active)
        _agrees(model.eval(), PROMPTS)
    with veneer.disabled(model), torch.no_grad():
        found = Decoder(model, 1, 16).read([[1, 2]])
        torch.testing.assert_close(found[0], base(torch.tensor([[1, 2]])).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_in_8_bits_the_products_are_those_of_int8_activations(variant):
    model = _model()
    quantise_linear_layers(model, storage="nf4")
    with veneer.int8_activations(model), torch.no_grad():
        decoder = Decoder(model, 1, 16)
        decoder.read([[1, 2, 3]])
        (found,) = decoder.step([4], [0])
        wanted = model(torch.tensor([[1, 2, 3, 4]])).logits[0, -1]
    with torch.no_grad():
        exact = model(torch.tensor([[1, 2, 3, 4]])).logits[0, -1]
    assert (found - wanted).norm() <= 0.015 * wanted.norm(), "the head's weight and input are rounded as well"
    assert not torch.equal(found, exact)
    assert (found - exact).norm() <= 0.05 * exact.norm()


def test_the_head_in_8_bits_is_made_anew_when_the_weight_changes():
    model = _model(tied=False)
    quantise_linear_layers(model, storage="nf4")
    with veneer.int8_activations(model), torch.no_grad():
        decoder = Decoder(model, 1, 16)
        decoder.read([[1]])
        before = decoder.step([2], [0])
        model.lm_head.weight.mul_(2)
        decoder = Decoder(model, 1, 16)
        decoder.read([[1]])
        torch.testing.assert_close(decoder.step([2], [0]), 2 * before)
    assert len(module._rounded_heads) == 1
    del model, decoder
    gc.collect()
    assert not module._rounded_heads, "it goes with the weight"


def _hooked(model):
    model.model.layers[1].register_forward_hook(lambda *_: None)


def _replaced(model):
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward


def _halved(model):
    model.to(torch.bfloat16)


def _new_rows(model):
    veneer.attach(model, veneer.LoRA(rank=2, new_tokens=[3]))


def _training(model):
    model.train()


@pytest.mark.parametrize("change", [_hooked, _replaced, _halved, _new_rows, _training])
def test_what_it_does_not_know_goes_another_way(change):
    model = _model()
    change(model)
    with pytest.raises(Unsupported):
        Decoder(model, 1, 8)


def test_nor_other_kinds_windows_and_rotations():
    window = _model("mistral")
    window.config.sliding_window = 4
    Decoder(window, 1, 4)
    with pytest.raises(Unsupported, match="window"):
        Decoder(window, 1, 5)
    stretched = _model("llama, rotations stretched")
    stretched.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(Unsupported, match="rotations"):
        Decoder(stretched, 1, 5)
    with pytest.raises(Unsupported, match="another kind"):
        Decoder(tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=9)).eval(), 1, 5)


def test_generate_says_the_same_by_either_way(monkeypatch):
    made = tokenizer()
    torch.manual_seed(1)
    config = tf.LlamaConfig(
        vocab_size=len(made), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.5,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    renderer = Renderer(made)
    prompts = [renderer.encode(text) for text in ("one", "a longer question, with a comma", "x")]
    streamed: list[list[str]] = []
    texts = []
    for way in (0, 1):
        if way:
            monkeypatch.setattr(module, "Decoder", _refusing)
        texts.append(continuations(model, renderer, prompts, max_new_tokens=20))
        streamed.append(list(pieces(model, renderer, prompts[0], max_new_tokens=20)))
        texts[-1] += continuations(model, renderer, prompts[:1], max_new_tokens=20, temperature=0.7, seed=4)
    assert texts[0] == texts[1]
    assert len(set(texts[0])) >= 4
    assert streamed[0] == streamed[1]
    assert "".join(streamed[0]) == texts[0][0]


def _refusing(*_):
    raise Unsupported


def test_the_extension_is_not_given_what_does_not_fit():
    decoder = Decoder(_model(), 2, 8)
    with torch.no_grad():
        decoder.read([[1, 2], [3]])
        for _ in range(6):
            decoder.step([1, 1], [0, 1])
        with pytest.raises(ValueError, match="positions are 0 up to 7, not 7 to 8"):
            decoder.step([1, 1], [0, 1])
        with pytest.raises(ValueError, match="sequences are 0 up to 1, not 0 to 2"):
            decoder._of(None).step(torch.zeros(2, 64), torch.tensor([0, 2]), torch.tensor([0, 0]))
