"""The type that a model computes in: which one, and that it computes in either what the same values should."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
import veneer
from veneer.errors import ConfigError
from veneer.frozen import blockwise, compute
from veneer.frozen.config import CODE_BITS, Storage
from veneer.frozen.layers import compute_in, compute_of, quantise_linear_layers, type_kept
from veneer.frozen.weight import DenseWeight, StoredConv1D, StoredLinear
from veneer.kernels.serving import serving
from veneer.models import load

pytestmark = pytest.mark.unit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The file that remembers the measurements, in a user's cache folder of its own, on a processor with bf16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compute, "has_bf16", lambda: True)
    compute._remembered.cache_clear()
    yield tmp_path / "veneer" / "compute.json"
    compute._remembered.cache_clear()


def _measured(monkeypatch, **ratios):
    """What was measured, in order; of each kind bf16 takes ``ratios`` times as long as fp32."""
    asked = []
    monkeypatch.setattr(compute, "_measured", lambda kind, threads: asked.append(kind) or ratios[kind])
    return asked


@pytest.mark.parametrize(("ratio", "chosen"), [(9.0, "fp32"), (0.9, "fp32"), (0.5, "bf16")])
def test_the_faster_type_is_chosen_and_remembered(cache, monkeypatch, ratio, chosen):
    """bf16 only where it gains a fifth of the time: it is the coarser one."""
    asked = _measured(monkeypatch, fp32=ratio)
    how = compute.computing("auto", "fp32")
    assert (how.name, how.dtype) == (chosen, load.DTYPES[chosen])
    assert str(how) == f"{chosen} (auto: a step in bf16 takes {ratio:.2g} × the time of fp32)"
    (key,) = json.loads(cache.read_text())
    for part in (f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", f"veneer {veneer.__version__}"):
        assert part in key
    assert key.endswith(f"{serving()} kernels, fp32")
    compute._remembered.cache_clear()  # another process
    assert compute.computing("auto", "fp32") == how
    assert asked == ["fp32"]


def test_each_way_of_keeping_weights_is_measured_by_itself(cache, monkeypatch):
    asked = _measured(monkeypatch, fp32=0.9, bf16=0.5, nf4=0.7)
    names = {storage: compute.computing("auto", storage).name for storage in get_args(Storage)}
    assert names == dict.fromkeys(get_args(Storage), "bf16") | {"fp32": "fp32"}
    assert asked == ["fp32", "bf16", "nf4"]


def test_what_is_asked_for_is_not_measured(cache, monkeypatch):
    asked = _measured(monkeypatch)
    for name in ("fp32", "bf16"):
        assert str(compute.computing(name, "nf4")) == name
    with pytest.raises(ConfigError, match=r"^compute = 'fp16' is not one of auto, fp32, bf16\.$"):
        compute.computing("fp16", "fp32")
    assert not asked


def test_without_instructions_for_bf16_nothing_is_measured(cache, monkeypatch):
    monkeypatch.setattr(compute, "has_bf16", lambda: False)
    asked = _measured(monkeypatch)
    assert str(compute.computing("auto", "bf16")) == "fp32 (auto: this processor has no instructions for bf16)"
    assert not asked
    assert not cache.exists()


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 avx2\n", True),
        ("flags\t\t: fpu avx512_bf16\nflags\t\t: fpu\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx512f avx2\nmodel name\t: amx_bf16\n", False),
        ("Features\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_the_instructions_of_a_processor(monkeypatch, text, has):
    monkeypatch.setattr(Path, "read_text", lambda path, **how: text)
    assert compute.has_bf16.__wrapped__() is has


def test_a_system_that_says_nothing_of_its_processor(monkeypatch):
    def missing(path, **how):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert compute.has_bf16.__wrapped__() is False


def test_another_number_of_threads_is_measured_anew(cache, monkeypatch):
    asked = _measured(monkeypatch, nf4=1.0)
    for threads in (1, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        compute._remembered.cache_clear()
        compute.bf16_time("nf4")
    assert len(asked) == 2
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "wrong"])
def test_a_broken_cache_is_measured_over(cache, monkeypatch, text):
    asked = _measured(monkeypatch, bf16=0.5)
    cache.parent.mkdir()
    cache.write_text(text)
    if text == "wrong":
        cache.write_text(json.dumps({compute._key("bf16", torch.get_num_threads(), serving()): "fast"}))
    assert compute.bf16_time("bf16") == 0.5
    assert len(asked) == 1
    assert list(json.loads(cache.read_text()).values()) == [0.5]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    _measured(monkeypatch, fp32=0.25)
    assert compute.bf16_time("fp32") == 0.25
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    compute._remembered.cache_clear()
    assert compute.bf16_time("fp32") == 0.25
    assert (tmp_path / "home" / ".cache" / "veneer" / "compute.json").is_file()


def test_a_measurement_that_fails_is_fp32_and_not_remembered(cache, monkeypatch):
    monkeypatch.setattr(compute.sys, "executable", "/bin/false")
    assert str(compute.computing("auto", "fp32")) == "fp32 (auto: the time of a step in bf16 could not be measured)"
    assert not cache.exists()


def test_the_measurement_leaves_this_process_alone(cache):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert 0.001 < compute.bf16_time("nf4") < 1000
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert len(json.loads(cache.read_text())) == 1


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


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, *tiny.TIED, *tiny.MIXTURES])
def test_any_model_computes_in_bf16_over_weights_that_stay_what_they_are(name, storage):
    """Close to fp32, from the embedding on; nothing of it is rounded in what would be written of it."""
    model, inputs = tiny.build(name), tiny.batch(name)
    if storage == "nf4":
        quantise_linear_layers(model, storage=storage, block_size=32)
    before, wanted = tiny.state(model), tiny.logits(model, inputs)
    compute_in(model, torch.bfloat16)
    made = tiny.logits(model, inputs)
    # Where two experts are nearly as likely, another one may be chosen for a token.
    of_token = (made.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(of_token.median() if name in tiny.MIXTURES else of_token.max()) < 0.03
    assert compute_of(model) is torch.bfloat16
    assert type_kept(model) is torch.float32
    norms = [m for n, m in model.named_modules() if type(m).__name__.lower().endswith("norm")]
    assert norms
    assert {parameter.dtype for norm in norms for parameter in norm.parameters()} == {torch.bfloat16}
    assert tiny.same_state(model, before)
    assert tiny.same_state(copy.deepcopy(model), before)
    given = {id(parameter) for parameter in model.parameters()}
    assert {id(tensor) for tensor in model.state_dict(keep_vars=True).values() if tensor.requires_grad} <= given


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_a_model_in_bf16_trains_as_in_fp32(name):
    """What is trained is fp32: an adapter, and norms and heads that are trained whole."""
    wanted, inputs = tiny.build(name), tiny.batch(name)
    model = copy.deepcopy(wanted)
    compute_in(model, torch.bfloat16)
    norm = next(n for n, m in model.named_modules() if "norm" in n.lower() or "ln_f" in n)
    losses, copies = [], []
    for each in (model, wanted):
        torch.manual_seed(0)
        veneer.attach(each, veneer.LoRA(rank=2, train_also=[norm]))
        trained = {n: p for n, p in each.named_parameters() if p.requires_grad}
        assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
        copies.append({n: p.detach().clone() for n, p in trained.items() if ".lora" not in n})
        torch.manual_seed(0)  # of dropout
        losses.append(tiny.train_steps(each, inputs))
    assert all(torch.equal(copies[0][name], copies[1][name]) for name in copies[1])
    assert abs(losses[0] - losses[1]) < 0.02


def test_a_parameter_that_gets_other_values_is_written_with_them():
    model = tiny.build("llama")
    compute_in(model, torch.bfloat16)
    norm, exact = model.model.norm, model.state_dict()["model.norm.weight"]
    assert exact.dtype == torch.float32
    with torch.no_grad():
        norm.weight.add_(1)
    assert torch.equal(model.state_dict()["model.norm.weight"], norm.weight)
    with torch.no_grad():
        norm.weight.copy_(exact)
    assert torch.equal(model.state_dict()["model.norm.weight"], exact)


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


def test_its_layers_can_be_quantised_and_its_head_is_left(tiny_folder):
    model, _ = veneer.load(tiny_folder, storage="bf16", compute="fp32")
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


@pytest.mark.parametrize("kind", [StoredLinear, StoredConv1D])
def test_where_no_gradient_is_asked_for_a_weight_that_may_be_trained_gives_the_frozen_ones_bits(kind):
    layer = nn.Linear(40, 24) if kind is StoredLinear else Conv1D(24, 40)
    layer.__class__ = kind
    x = torch.randn(9, 40).bfloat16()
    with torch.no_grad():
        trainable = layer(x)
    assert torch.equal(layer.requires_grad_(False)(x), trainable)


def test_a_conv1d_that_is_trained_gets_its_gradient():
    layer = Conv1D(5, 9).bfloat16()
    plain = copy.deepcopy(layer).float()
    layer.__class__ = StoredConv1D
    x = torch.randn(3, 9)
    for each in (layer, plain):
        each(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad.float(), plain.weight.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("storage", get_args(Storage))
@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_what_load_gives(tiny_folder, storage, chosen, tmp_path):
    model, made = veneer.load(tiny_folder, storage=storage, compute=chosen)
    kept = load.DTYPES.get(storage, torch.float32)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == kept
    assert model.model.norm.weight.dtype == load.DTYPES[chosen]
    ids = tiny.batch("llama")
    assert tiny.logits(model, ids).dtype == load.DTYPES[chosen]
    plain = tiny.logits(veneer.load(tiny_folder, storage=storage if storage in CODE_BITS else "fp32")[0], ids)
    tolerance = 2e-3 if chosen == "fp32" else 0.05
    torch.testing.assert_close(tiny.logits(model, ids).float(), plain, rtol=tolerance, atol=tolerance)
    assert load.storage_of(model)["storage"] == storage
    if storage in CODE_BITS:
        return
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    written = veneer.load(tmp_path)[0]
    torch.testing.assert_close(tiny.logits(written, ids), plain, rtol=0.01, atol=0.01)
    if storage == "fp32":
        assert tiny.same_state(written, tiny.state(veneer.load(tiny_folder)[0]))


def test_another_type_of_computing_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match=r"^compute = 'fp8' is not one of auto, fp32, bf16\.$"):
        veneer.load(tiny_folder, compute="fp8")


def test_parts_of_an_input_gradient_are_added_in_fp32(monkeypatch):
    """Expanded by panels, it is rounded once for all of them, not once a panel."""
    generator = torch.Generator().manual_seed(0)
    kept, grad = torch.randn(4096, 64, generator=generator), torch.randn(8, 4096, generator=generator).bfloat16()
    exact = grad.double() @ kept.bfloat16().double()

    def error(panel):
        monkeypatch.setattr(blockwise, "PANEL", panel)
        made = DenseWeight(kept).product_transposed(grad)
        assert made.dtype == torch.bfloat16
        return float((made.double() - exact).norm() / exact.norm())

    assert error(64 * 64) < 1.4 * error(2**20)
