"""A quantised linear layer computes what a plain one does with the weight that it stands for."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
import veneer
from veneer.errors import ModelError, TargetError
from veneer.frozen import blockwise
from veneer.frozen.codebook import levels8
from veneer.frozen.config import CODE_BITS
from veneer.frozen.layers import quantise_linear_layers
from veneer.frozen.weight import DenseWeight, QuantisedLinear, frozen_weight, int8_activations
from veneer.kernels.operations.products_int8 import product4_int8
from veneer.kernels.serving import serving

pytestmark = pytest.mark.unit


def _linear(columns, rows, bias=True, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(columns, rows, bias=bias).to(dtype)


@given(
    st.sampled_from(list(CODE_BITS)), st.integers(1, 40), st.integers(1, 90), st.integers(1, 5), st.booleans(),
    st.integers(1, 400),
)  # fmt: skip
def test_forward_and_backward_by_panels_equal_the_dense_product(storage, rows, columns, batch, bias, panel):
    linear = _linear(columns, rows, bias)
    ours = QuantisedLinear.of(linear, storage=storage)
    dense = ours.frozen().dense()
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "PANEL", panel)
        y = ours(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
    wanted = F.linear(x, dense, linear.bias)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 0, 7)])
def test_any_leading_dimensions(shape):
    linear = QuantisedLinear.of(_linear(7, 5))
    x = torch.randn(shape)
    y = linear(x)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y, F.linear(x, linear.frozen().dense(), linear.bias))


@pytest.mark.skipif(serving() == "reference", reason="plain PyTorch expands 4-bit panels through temporaries")
@pytest.mark.parametrize("storage", CODE_BITS)
def test_no_full_size_copy_of_the_weight_is_made_and_its_panels_share_one_buffer(storage, monkeypatch):
    """What the allocator hands out in a forward and backward pass: the outputs, the scales, and no panel anew."""
    monkeypatch.setattr(blockwise, "_room", threading.local())
    monkeypatch.setattr(blockwise, "PANEL", 2**18)
    linear = QuantisedLinear.of(_linear(1024, 1024, bias=False), storage=storage)
    x = torch.randn(2, 1024, requires_grad=True)
    for first_time in (True, False):
        with torch.profiler.profile(profile_memory=True) as profile:
            linear(x).sum().backward()
        sizes = _allocated(profile)
        assert max(sizes) <= (blockwise.PANEL + 64) * 4, "a panel is the largest thing made"
        assert sum(sizes) < 4 * 2**20 * (0.75 if first_time else 0.25)


def _allocated(profile):
    """The sizes of the allocations, in bytes."""
    return [
        event.extra_fields.alloc_size
        for event in _events(profile.profiler.kineto_results.experimental_event_tree())
        if event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.alloc_size > 0
    ]


def _events(tree):
    for event in tree:
        yield event
        yield from _events(event.children)


def test_nothing_but_the_input_gets_a_gradient():
    linear = QuantisedLinear.of(_linear(6, 5))
    assert [name for name, p in linear.named_parameters() if p.requires_grad] == []
    x = torch.randn(2, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_product_runs_in_the_type_of_its_input(dtype):
    linear = QuantisedLinear.of(_linear(96, 20))
    x = torch.randn(4, 96, dtype=dtype)
    y = linear(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, linear.frozen().dense().to(dtype), linear.bias.to(dtype)), rtol=2e-2,
                               atol=2e-2)  # fmt: skip


def test_autocast_chooses_the_type_as_it_does_for_a_plain_layer():
    linear = QuantisedLinear.of(_linear(8, 4))
    x = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_moving_a_model_to_another_type_keeps_the_scales_and_so_the_values():
    linear = QuantisedLinear.of(_linear(90, 7))
    dense = linear.frozen().dense()
    for other in (copy.deepcopy(linear).to(torch.bfloat16), copy.deepcopy(linear).half().float()):
        assert torch.equal(other.nested_scales, linear.nested_scales)
        assert torch.equal(other.offset, linear.offset)
        assert torch.equal(other.frozen().dense(), dense.to(other.dtype))
    half = copy.deepcopy(linear).to(torch.bfloat16)
    assert (half.dtype, half.weight.dtype, half.bias.dtype) == (torch.bfloat16,) * 3
    assert linear.to("cpu").dtype == torch.float32
    assert linear.to("meta").codes.is_meta


def test_what_a_model_may_ask_of_its_layer():
    linear = QuantisedLinear.of(_linear(90, 7, bias=False, dtype=torch.bfloat16).eval())
    assert (linear.weight.shape, linear.weight.dtype, linear.bias) == ((0, 90), torch.bfloat16, None)
    assert not linear.training
    assert str(linear) == "QuantisedLinear(in_features=90, out_features=7, storage=nf4)"
    # Two codes a byte, a byte for each block's scale, a float for 256 of those, and their mean.
    kept = sum(tensor.numel() * tensor.element_size() for tensor in linear.state_dict().values())
    assert kept == 315 + 10 + 4 + 4


def test_a_state_dict_carries_it():
    linear, other = QuantisedLinear.of(_linear(9, 5)), QuantisedLinear.of(nn.Linear(9, 5))
    other.load_state_dict(linear.state_dict())
    x = torch.randn(3, 9)
    assert torch.equal(other(x), linear(x))


def test_a_conv1d_is_kept_as_out_by_in():
    conv = Conv1D(5, 9)  # (out, in), its weight is (in, out)
    linear = QuantisedLinear.of(conv)
    assert (linear.out_features, linear.in_features, linear.transposed) == (5, 9, True)
    plain = nn.Linear(9, 5)
    plain.weight = nn.Parameter(conv.weight.detach().t().contiguous())
    assert torch.equal(linear.frozen().dense(), QuantisedLinear.of(plain).frozen().dense())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_plain_weight_multiplies_without_a_copy(kind):
    module = _linear(6, 4) if kind == "linear" else Conv1D(4, 6)
    weight = frozen_weight(module)
    assert isinstance(weight, DenseWeight)
    assert weight.dense().data_ptr() == module.weight.data_ptr()
    assert weight.shape == (4, 6)
    x, grad = torch.randn(3, 6), torch.randn(3, 4)
    torch.testing.assert_close(weight.product(x, module.bias), module(x))
    torch.testing.assert_close(weight.product_transposed(grad), grad @ weight.dense())
    assert weight.product(x.bfloat16(), module.bias).dtype == torch.bfloat16


def test_a_module_without_such_a_weight_is_refused():
    with pytest.raises(TargetError, match=r"^A LayerNorm has no frozen weight to multiply by\.$"):
        frozen_weight(nn.LayerNorm(3))


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_linear_layer_but_the_head_is_quantised(name):
    model, inputs = tiny.build(name), tiny.batch(name)
    plain = tiny.build(name)
    linear = {path for path, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    quantise_linear_layers(model)
    left = {path for path, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    assert left == linear & {"lm_head", "classifier", "embed_out"}
    # The same model with the dequantised weights in plain layers answers the same.
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, QuantisedLinear):
                dense = module.frozen().dense()
                plain.get_submodule(path).weight.copy_(dense.t() if module.transposed else dense)
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(plain, inputs), rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_not_finite_is_named_by_its_place_in_the_model():
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight holds a value that is not finite"):
        quantise_linear_layers(model)


def _close_but_not_equal(found, exact):
    error = float((found - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.02
    return True


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int4"])
def test_in_8_bits_a_few_rows_are_multiplied_nearly_the_same_and_many_the_same(storage):
    linear = QuantisedLinear.of(_linear(96, 40), storage=storage)
    few, many = torch.randn(2, 4, 96), torch.randn(9, 96)
    with torch.no_grad():
        exact, of_many = linear(few), linear(many)
        with int8_activations(linear):
            found = linear(few)
            assert torch.equal(linear(many), of_many)
            assert linear(few.double()).dtype == torch.float64
        assert torch.equal(linear(few), exact)
    assert found.shape == exact.shape
    assert _close_but_not_equal(found, exact)
    # Of what is rounded, x and the table, by definition:
    by_definition = few_row_product_by_definition(linear, few.view(8, 96)).view(exact.shape)
    torch.testing.assert_close(found, by_definition, rtol=1e-5, atol=1e-5)


def few_row_product_by_definition(linear, x):
    levels, step = levels8(linear.storage)
    return product4_int8.definition(x, linear.quantised.coded, levels, step) + linear.bias


def test_so_are_those_of_an_adapted_layer():
    linear = QuantisedLinear.of(_linear(96, 40))
    model = nn.Sequential(linear)
    veneer.attach(model, veneer.LoRA(rank=4, targets="all-linear"))
    x = torch.randn(1, 96)
    with torch.no_grad():
        exact = model(x)
        with int8_activations(model):
            assert _close_but_not_equal(model(x), exact)


def test_nothing_is_trained_through_8_bits():
    linear = QuantisedLinear.of(_linear(64, 8))
    model = nn.Sequential(linear)
    x = torch.randn(2, 64)
    refusal = r"^Activations in 8 bits are for generation: nothing is learned through them\. Leave int8_activations"
    with int8_activations(model):
        for given in (x, x.clone().requires_grad_(), torch.randn(20, 64)):
            with pytest.raises(ModelError, match=refusal):
                model(given)
        veneer.attach(model, veneer.LoRA(rank=2, targets="all-linear"))
        with pytest.raises(ModelError, match=refusal):
            model(x)
    model(x).sum().backward()


def test_8_bits_need_4_bits_under_them():
    wanted = r"^Activations in 8 bits need a base kept in 4 bits \(storage nf4, fp4 or int4\); this is none\.$"
    for model in (
        _linear(64, 8),
        QuantisedLinear.of(_linear(64, 8), storage="int8"),
        QuantisedLinear.of(_linear(40, 8)),
    ):
        with pytest.raises(ModelError, match=wanted), int8_activations(model):
            pass


def test_a_layer_whose_rows_are_no_groups_stays_exact():
    model = nn.ModuleList([QuantisedLinear.of(_linear(40, 8)), QuantisedLinear.of(_linear(64, 8))])
    x = torch.randn(1, 40)
    with torch.no_grad():
        exact = model[0](x)
        with int8_activations(model):
            assert torch.equal(model[0](x), exact)
