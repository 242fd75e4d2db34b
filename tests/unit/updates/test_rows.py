"""Rows of one batch with adapters of their own: each as if it were alone with its adapter active."""

from __future__ import annotations

import pytest
import torch

import tiny
import veneer
from veneer.frozen.layers import quantise_linear_layers
from veneer.frozen.weight import DenseWeight
from veneer.updates.layers import Adapted
from veneer.updates.product import Factors, adapted_product
from veneer.updates.record import row_adapters

pytestmark = pytest.mark.unit
NAMES = [("a",), (), ("b",), ("a",), ("a", "b")]
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3], [7, 8, 9], [2, 2, 2]])


def _adapted(model, **options):
    for name, rank in (("a", 3), ("b", 2)):
        veneer.attach(model, veneer.LoRA(rank=rank, **options), name=name)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if f".updates.{name}." in path:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _inputs(model, tokens):
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}


def _agrees(model, names=NAMES):
    tokens = TOKENS[: len(names)]
    veneer.activate(model, "b")
    with torch.no_grad():
        with row_adapters(model, names, tokens.shape[1]):
            mixed = model(**_inputs(model, tokens)).logits
        alone = []
        for row, active in zip(tokens, names, strict=True):
            veneer.activate(model, *active)
            alone.append(model(**_inputs(model, row[None])).logits[0])
    assert not torch.allclose(alone[0], alone[2], atol=1e-3), "another adapter, other logits"
    torch.testing.assert_close(mixed, torch.stack(alone), rtol=1e-5, atol=1e-5)
    assert all(module.rows is None for module in model.modules() if isinstance(module, Adapted))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "gemma3"])
def test_each_row_is_as_it_is_alone(name):
    _agrees(_adapted(tiny.build(name)))


def test_over_4_bits():
    model = tiny.build("llama")
    quantise_linear_layers(model, storage="nf4", block_size=32)
    _agrees(_adapted(model))


def test_of_a_vocabulary():
    _agrees(_adapted(tiny.build("llama"), targets=["embed_tokens", "lm_head"]))


@pytest.mark.parametrize("options", [{"new_tokens": [2, 8]}, {"train_also": ["lm_head", "embed_tokens", "norm"]}])
def test_where_an_adapter_replaces_something(options):
    model = _adapted(tiny.build("llama-tied" if "new_tokens" in options else "llama"), **options)
    _agrees(model, NAMES[:-1])  # a and b cannot be in force together here


def test_rows_that_agree_take_the_path_of_the_active_adapter_bit_for_bit():
    model = _adapted(tiny.build("llama"))
    veneer.activate(model, "a")
    with torch.no_grad():
        wanted = model(TOKENS).logits
        veneer.activate(model)
        with row_adapters(model, [("a",)] * len(TOKENS), 3):
            assert torch.equal(model(TOKENS).logits, wanted)


def test_another_model_of_the_process_is_left_alone():
    one, other = _adapted(tiny.build("llama")), _adapted(tiny.build("llama"))
    with torch.no_grad():
        wanted = other(TOKENS).logits
        with row_adapters(one, NAMES, 3):
            assert torch.equal(other(TOKENS).logits, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_products_gradients(dropout):
    torch.manual_seed(0)
    shapes = (5, 6), (3, 6), (7, 3), (2, 6), (7, 2)
    flat = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weight, bias = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    rows = torch.tensor([0, 3]), torch.tensor([1, 3, 4])

    def product(x, A, B, C, D):
        torch.manual_seed(3)  # the same elements dropped at every evaluation
        updates = [Factors(A, B, 2.0, dropout, rows=rows[0]), Factors(C, D, 0.5, rows=rows[1])]
        return adapted_product(x, DenseWeight(weight), bias, updates)

    assert torch.autograd.gradcheck(product, flat)
    if not dropout:
        x, A, B, C, D = flat
        wanted = x @ weight.T + bias
        wanted[rows[0]] += 2 * x[rows[0]] @ A.T @ B.T
        wanted[rows[1]] += 0.5 * x[rows[1]] @ C.T @ D.T
        torch.testing.assert_close(product(*flat), wanted)


def test_a_layer_that_mixes_rows_is_a_sentence():
    model = _adapted(tiny.build("llama"))
    layer = model.model.layers[0].mlp.gate_proj
    with (
        row_adapters(model, NAMES, 3),
        pytest.raises(veneer.VeneerError, match=r"is given \(4,\) vectors of a batch"),
    ):
        layer(torch.zeros(4, 32))
