"""A base in 16 bits: which type it is multiplied in, and that it is what the same values in fp32 compute."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
import veneer
from veneer.environment import processor
from veneer.frozen import blockwise, compute
from veneer.frozen.layers import compute_in, quantise_linear_layers
from veneer.frozen.weight import DenseWeight, StoredConv1D, StoredLinear
from veneer.models import load

pytestmark = pytest.mark.unit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The file that remembers the measurement, in a user's cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compute._remembered.cache_clear()
    yield tmp_path / "veneer" / "bf16.json"
    compute._remembered.cache_clear()


def _measured(monkeypatch, seconds):
    """How often was measured; a product takes what ``seconds`` says of its type."""
    asked = []
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    monkeypatch.setattr(compute, "_measured", lambda: asked.append(ratio) or ratio)
    return asked


@pytest.mark.parametrize(("bf16", "chosen"), [(9.0, "fp32"), (0.9, "fp32"), (0.5, "bf16")])
def test_the_faster_type_is_chosen_and_remembered(cache, monkeypatch, bf16, chosen):
    """bf16 only where it gains a fifth of the time: it is the coarser one."""
    asked = _measured(monkeypatch, {torch.bfloat16: bf16, torch.float32: 1.0})
    assert compute.compute_name() == chosen
    assert compute.compute_line() == f"{chosen} (a bf16 product takes {bf16:.2g} × the time of an fp32 one)"
    (key,) = json.loads(cache.read_text())
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads" in key
    compute._remembered.cache_clear()  # another process
    assert compute.compute_name() == chosen
    assert len(asked) == 1


def test_another_number_of_threads_is_measured_anew(cache, monkeypatch):
    asked = _measured(monkeypatch, {torch.bfloat16: 1.0, torch.float32: 1.0})
    for threads in (1, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        compute._remembered.cache_clear()
        compute.bf16_time()
    assert len(asked) == 2
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "wrong"])
def test_a_broken_cache_is_measured_over(cache, monkeypatch, text):
    asked = _measured(monkeypatch, {torch.bfloat16: 1.0, torch.float32: 2.0})
    cache.parent.mkdir()
    cache.write_text(text)
    if text == "wrong":
        key = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        cache.write_text(json.dumps({key: "fast"}))
    assert compute.bf16_time() == 0.5
    assert len(asked) == 1
    assert list(json.loads(cache.read_text()).values()) == [0.5]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    _measured(monkeypatch, {torch.bfloat16: 1.0, torch.float32: 4.0})
    assert compute.bf16_time() == 0.25
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    compute._remembered.cache_clear()
    assert compute.bf16_time() == 0.25
    assert (tmp_path / "home" / ".cache" / "veneer" / "bf16.json").is_file()


def test_the_measurement_is_short_and_leaves_the_random_state_alone(cache):
    before = torch.get_rng_state()
    assert 0.001 < compute.bf16_time() < 1000
    assert torch.equal(torch.get_rng_state(), before)


@given(
    rows=st.integers(0, 4), out=st.integers(1, 40), columns=st.integers(1, 40), turned=st.booleans(),
    dtype=st.sampled_from(["half", "bfloat16"]), panel=st.sampled_from([1, 64, 2**20]),
)  # fmt: skip
def test_products_are_those_of_the_same_values_in_fp32(rows, out, columns, dtype, turned, panel):
    generator = torch.Generator().manual_seed(0)
    kept = getattr(torch.randn(*((columns, out) if turned else (out, columns)), generator=generator), dtype)()
    x, grad = torch.randn(rows, columns, generator=generator), torch.randn(rows, out, generator=generator)
    bias, weight = torch.randn(out, generator=generator), DenseWeight(kept, transposed=turned)
    dense = kept.float().t() if turned else kept.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "PANEL", panel)
        y, back = weight.product(x, bias), weight.product_transposed(grad)
    assert y.dtype == back.dtype == torch.float32
    torch.testing.assert_close(y, F.linear(x, dense, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back, grad @ dense, rtol=1e-5, atol=1e-5)


def test_no_full_size_copy_is_made(monkeypatch):
    monkeypatch.setattr(blockwise, "_room", threading.local())
    monkeypatch.setattr(blockwise, "PANEL", 2**16)
    weight = DenseWeight(torch.zeros(1024, 1024, dtype=torch.bfloat16))
    with torch.profiler.profile(profile_memory=True) as profile:
        weight.product_transposed(weight.product(torch.zeros(2, 1024)))
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= 2**16 * 4


def _plain(model):
    """The same values, everything in fp32."""
    return copy.deepcopy(model).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_model_computes_what_the_same_values_in_fp32_compute(name, dtype):
    model = tiny.build(name).to(dtype)
    wanted, inputs = _plain(model), tiny.batch(name)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["labels"]
    compute_in(model, torch.float32)
    if name in ("gemma", "gemma3"):  # it scales what it looks up in the type of its table
        wanted.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(wanted, inputs), rtol=1e-4, atol=1e-4)
    stored = [m for m in model.modules() if type(m) in (StoredLinear, StoredConv1D)]
    assert stored
    assert {m.weight.dtype for m in stored} == {dtype}
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n.lower()} <= {torch.float32}


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "t5"])
def test_it_trains_and_merges_as_over_fp32(name, monkeypatch):
    """An adapter, and a head that is trained whole."""
    model = tiny.build(name).bfloat16()
    wanted, inputs = _plain(model), tiny.batch(name)
    compute_in(model, torch.float32)
    config = veneer.LoRA(rank=2, train_also=["lm_head"] if name == "llama-tied" else [])
    for each in (model, wanted):
        torch.manual_seed(0)
        veneer.attach(each, config)
    losses = []
    for each in (model, wanted):
        torch.manual_seed(0)  # of dropout
        losses.append(tiny.train_steps(each, inputs))
    assert abs(losses[0] - losses[1]) < (0.02 if config.train_also else 1e-3)
    before = tiny.logits(model, inputs)
    veneer.merge(model)
    assert {m.weight.dtype for m in model.modules() if type(m) in (StoredLinear, StoredConv1D)} <= {torch.bfloat16}
    torch.testing.assert_close(tiny.logits(model, inputs), before, rtol=0.1, atol=0.1)
    veneer.unmerge(model)
    assert torch.equal(tiny.logits(model, inputs), before)
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


def test_its_layers_can_be_quantised_and_its_head_is_left(tiny_folder, monkeypatch):
    monkeypatch.setattr(load, "compute_name", lambda: "fp32")
    model, _ = veneer.load(tiny_folder, storage="bf16")
    assert type(model.lm_head) is StoredLinear
    quantise_linear_layers(model, storage="nf4")
    assert type(model.lm_head) is StoredLinear
    assert str(model.model.layers[0].mlp.up_proj).startswith("QuantisedLinear")


def test_autocast_chooses_the_type_as_it_does_for_a_plain_layer():
    layer = nn.Linear(8, 4).half()
    layer.__class__ = StoredLinear
    layer.requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_conv1d_that_is_trained_gets_its_gradient():
    layer = Conv1D(5, 9).bfloat16()
    plain = copy.deepcopy(layer).float()
    layer.__class__ = StoredConv1D
    x = torch.randn(3, 9)
    for each in (layer, plain):
        each(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad.float(), plain.weight.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("storage", ["bf16", "fp16"])
@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_what_load_gives(tiny_folder, monkeypatch, storage, chosen, tmp_path):
    monkeypatch.setattr(load, "compute_name", lambda: chosen)
    model, made = veneer.load(tiny_folder, storage=storage)
    kept = load.DTYPES[storage]
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == kept
    assert model.model.norm.weight.dtype == load.DTYPES[chosen]
    ids = tiny.batch("llama")
    assert tiny.logits(model, ids).dtype == load.DTYPES[chosen]
    plain = tiny.logits(veneer.load(tiny_folder)[0], ids)
    tolerance = 2e-3 if chosen == "fp32" else 0.05
    torch.testing.assert_close(tiny.logits(model, ids).float(), plain, rtol=tolerance, atol=tolerance)
    assert load.storage_of(model) == {"storage": storage}
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    torch.testing.assert_close(tiny.logits(veneer.load(tmp_path)[0], ids), plain, rtol=0.01, atol=0.01)
