"""A session: sequences join, leave and have adapters of their own, and each is what it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import tiny
import veneer
from tokens import tokenizer
from veneer.data.labels import Renderer
from veneer.frozen.layers import quantise_linear_layers
from veneer.generation import batched, decoder
from veneer.generation.batched import BatchedLane, WholeLane
from veneer.generation.session import Session
from veneer.kernels import decode
from veneer.kernels.backends import cpu

pytestmark = pytest.mark.unit
KERNELS = pytest.mark.skipif(not cpu.VARIANTS, reason="the C++ kernels were not built")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], list(range(20, 44)), [1, 2]]


def _llama():
    torch.manual_seed(1)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def _with_adapters(model: Any, **options: Any) -> Any:
    for name in ("a", "b"):
        veneer.attach(model, veneer.LoRA(rank=4, targets="all-linear", **options), name=name)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if f".updates.{name}." in path:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(params=[pytest.param("kernels", marks=KERNELS), "torch"])
def way(request, monkeypatch):
    """By which of the two ways a Llama is generated."""
    if request.param == "torch":
        monkeypatch.setattr(decoder, "Decoder", _refusing)
    return request.param


def _refusing(*_: Any) -> None:
    raise decoder.Unsupported


def _run(session, steps=1):
    """Key → the tokens of so many steps."""
    tokens: dict[int, list[int]] = {}
    for _ in range(steps):
        for added in session.step():
            tokens.setdefault(added.key, []).append(added.token)
    return tokens


def _alone(model, prompt, count, **how):
    session = Session(model, Renderer(tokenizer()))
    key = session.add(prompt, max_new_tokens=count, **how)
    return _run(session, count)[key]


def _greedy(model, prompt, count):
    """The definition: the whole sequence through the model for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_sequences_join_and_leave_while_others_go_on(way):
    model = _llama()
    wanted = [_greedy(model, prompt, 12) for prompt in PROMPTS]
    session = Session(model, Renderer(tokenizer()))
    keys = [session.add(prompt, max_new_tokens=12) for prompt in PROMPTS[:2]]
    got = {key: [] for key in range(5)}

    def step(count):
        for key, tokens in _run(session, count).items():
            got[key] += tokens

    step(3)
    keys += [session.add(prompt, max_new_tokens=12) for prompt in PROMPTS[2:4]]
    step(2)
    session.drop(keys[0])
    step(1)
    keys.append(session.add(PROMPTS[4], max_new_tokens=12))
    assert session.keys() == keys[1:]
    step(12)
    assert session.keys() == []
    assert session.step() == []
    assert len(got[0]) == 5
    assert got[0] == wanted[0][:5]
    assert [got[key] for key in keys[1:]] == wanted[1:]
    session.add(PROMPTS[0], max_new_tokens=12)
    assert list(_run(session, 12).values()) == [wanted[0]], "and again, after all have left"


def test_each_step_adds_one_token_to_each_and_says_what_ended(way):
    model = _llama()
    (first, *_), second = _greedy(model, PROMPTS[0], 2), _greedy(model, PROMPTS[1], 5)
    model.generation_config.eos_token_id = [first, 300]
    assert first not in second
    session = Session(model, Renderer(tokenizer()))
    session.add(PROMPTS[0], max_new_tokens=5)
    session.add(PROMPTS[1], max_new_tokens=2)
    assert session.step() == [(0, first, True), (1, second[0], False)]
    assert session.step() == [(1, second[1], True)]
    assert session.step() == []


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptneox", "gemma3", "phi3", "t5"])
def test_other_models(name):
    """Learned positions, windows that keep batches apart, and whole answers of an encoder-decoder."""
    model = tiny.build(name).eval()
    model.generation_config.eos_token_id = None
    made = tokenizer()
    made.pad_token_id = 0
    session = Session(model, Renderer(made, seq2seq=name == "t5"))
    prompts = [list(range(1, 30)), [12], [13, 14, 15]]  # the first longer than Gemma's window
    keys = [session.add(prompt, max_new_tokens=8) for prompt in prompts[:2]]
    got = _run(session, 3)
    session.drop(keys[0])
    keys.append(session.add(prompts[2], max_new_tokens=8))
    for key, tokens in _run(session, 8).items():
        got[key] = got.get(key, []) + tokens
    assert isinstance(session._other, WholeLane if name == "t5" else BatchedLane)
    wanted = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        wanted.append(out[0, 1 if name == "t5" else len(prompt) :].tolist())
    assert [got[0], got[1], got[2]] == [wanted[0][:3], *wanted[1:]]


def test_plain_batches_join_into_one_and_give_their_padding_back():
    model = tiny.build("gpt2").eval()
    session = Session(model, Renderer(tokenizer()))
    session.add(list(range(1, 30)), max_new_tokens=4)
    session.step()
    session.add([1, 2], max_new_tokens=8)
    session.step()
    (batch,) = session._other._batches
    assert batch.mask.shape == (2, 30)
    assert len(batch.members) == 2
    _run(session, 2)
    assert batch.mask.shape == (1, 4), "the long one has left"
    assert batch.cache.layers[0].keys.shape[:3] == (1, 4, 4)


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_rows_have_adapters_of_their_own(way, storage):
    model = _llama()
    if storage == "nf4":
        quantise_linear_layers(model, storage="nf4")
    base = [_greedy(model, prompt, 8) for prompt in PROMPTS[:3]]
    model = _with_adapters(model)
    veneer.activate(model, "b")
    wanted = []
    for prompt in PROMPTS[:3]:
        alone = []
        for name in ("a", "b"):
            veneer.activate(model, name)
            alone.append(_greedy(model, prompt, 8))
        wanted.append(alone)
    veneer.activate(model, "b")
    session = Session(model, Renderer(tokenizer()))
    for prompt in PROMPTS[:3]:
        for how in ({"adapter": "a"}, {"adapter": None}, {}):
            session.add(prompt, max_new_tokens=8, **how)
    assert isinstance(session._decoder._decoder, decoder.Decoder if way == "kernels" else type(None))
    got = list(_run(session, 8).values())
    assert got[0::3] == [alone[0] for alone in wanted]
    assert got[1::3] == base
    assert got[2::3] == [alone[1] for alone in wanted], "by default the active one"
    assert len({tuple(tokens) for tokens in got}) == 9


@KERNELS
def test_beside_other_adapters_the_kernels_logits_are_the_same_bits(monkeypatch):
    model = _with_adapters(_llama())
    seen: dict[int, list[torch.Tensor]] = {}
    draw = decoder.draw

    def watched(logits, samplers):
        for row, sampler in zip(logits, samplers, strict=True):
            seen.setdefault(id(sampler), []).append(row.clone())
        return draw(logits, samplers)

    monkeypatch.setattr(decoder, "draw", watched)
    names = ["a", None, "b"]

    def logits(adapters):
        seen.clear()
        session = Session(model, Renderer(tokenizer()))
        rows = []
        for adapter in adapters:
            for prompt in PROMPTS:
                key = session.add(prompt, adapter=adapter, max_new_tokens=6)
                rows.append(session._live[key][0])
        _run(session, 6)
        return [torch.stack(seen[id(row.sampler)]) for row in rows]

    mixed = logits(names)
    for i, name in enumerate(names):
        alone = logits([name])
        assert all(map(torch.equal, alone, mixed[5 * i : 5 * i + 5]))


def test_the_batched_pass_gives_each_row_the_logits_it_has_alone(monkeypatch):
    """Of mixed adapters in one pass, to a tight tolerance: a matrix product of other height sums in another order."""
    monkeypatch.setattr(decoder, "Decoder", _refusing)
    model = _with_adapters(_llama())
    rows: list[torch.Tensor] = []
    draw = batched.draw
    monkeypatch.setattr(batched, "draw", lambda logits, samplers: rows.append(logits.clone()) or draw(logits, samplers))
    names = ["a", None, "b"]
    session = Session(model, Renderer(tokenizer()))
    for name in names:
        session.add(PROMPTS[0], adapter=name, max_new_tokens=4)
    _run(session, 4)
    mixed = torch.stack(rows)
    for i, name in enumerate(names):
        rows.clear()
        _alone(model, PROMPTS[0], 4, adapter=name)
        alone = torch.stack(rows)[:, 0]
        assert (mixed[:, i] - alone).abs().max() <= 5e-6 * alone.abs().max()


def test_an_adapter_that_the_kernels_do_not_know_goes_beside_them():
    model = _llama()
    model = _with_adapters(model)
    veneer.attach(model, veneer.LoRA(rank=2, train_also=["lm_head"]), name="head")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".updates.head." in path:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval()
    wanted = {}
    for name in ("a", "head"):
        veneer.activate(model, name)
        wanted[name] = _greedy(model, PROMPTS[0], 6)
    session = Session(model, Renderer(tokenizer()))
    for name in wanted:
        session.add(PROMPTS[0], adapter=name, max_new_tokens=6)
    assert list(_run(session, 6).values()) == list(wanted.values())


def test_a_temperature_and_a_seed_for_each(way):
    model = _llama()
    hows = [{"temperature": 1.5, "seed": 1}, {"temperature": 1.5, "seed": 2}, {}, {"temperature": 0.7, "seed": 1}]
    alone = [_alone(model, PROMPTS[0], 8, **how) for how in hows]
    session = Session(model, Renderer(tokenizer()))
    for how in hows:
        session.add(PROMPTS[0], max_new_tokens=8, **how)
    assert list(_run(session, 8).values()) == alone
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_what_a_session_refuses():
    model = _with_adapters(_llama())
    session = Session(model, Renderer(tokenizer()))
    with pytest.raises(veneer.VeneerError, match=r"^No adapter named 'c' is attached\. Attached are: a, b\.$"):
        session.add([1], adapter="c")
    with pytest.raises(veneer.VeneerError, match=r"^A prompt is empty"):
        session.add([])
    with pytest.raises(KeyError):
        session.drop(0)
    key = session.add([1], max_new_tokens=1)
    session.step()
    session.drop(key)  # it has ended already
    veneer.merge(model)
    with pytest.raises(veneer.VeneerError, match="merged into its weights"):
        session.add([1], adapter="a")


@KERNELS
def test_a_step_of_the_kernels_is_one_call_for_all_with_the_same_adapters(monkeypatch):
    model = _with_adapters(_llama())
    session = Session(model, Renderer(tokenizer()))
    for adapter in ("a", None, "a", "a", None):
        session.add(PROMPTS[0], adapter=adapter, max_new_tokens=4)
    session.step()
    calls: list[int] = []
    step = decode.Decoder.step
    monkeypatch.setattr(decode.Decoder, "step", lambda self, x, *more: calls.append(len(x)) or step(self, x, *more))
    session.step()
    assert calls == [3, 2]
