"""What runs on the pretended device, against the CPU. tests/unit/test_pretended_device.py runs this in a process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
import veneer
from pretended import device
from veneer.data.labels import Tokens
from veneer.frozen import blockwise
from veneer.frozen.layers import quantise_linear_layers
from veneer.frozen.weight import QuantisedLinear
from veneer.models.load import load
from veneer.training import eight_bit
from veneer.training.fused import fused_passes
from veneer.training.loss import Loss
from veneer.training.recompute import recomputed

STORAGES = ("nf4", "fp4", "int4", "int8")
# What a step may bring over, or wait for; anything else makes each step of a GPU wait.
ALLOWED = {
    ("to device", "packing.py:hidden_of_rows"): "ids, places and labels",
    ("to device", "loss.py:<genexpr>"): "rows that are padded",
    ("to device", "loss.py:_learned"): "the places where something is learned",
    ("wait", "masking_utils.py:find_packed_sequence_indices"): "transformers' own, once a pass",
    ("wait", "masking_utils.py:_ignore_bidirectional_mask_sdpa"): "transformers' own, of an encoder",
    ("wait", "masking_utils.py:_ignore_causal_mask_sdpa"): "transformers' own, of padded rows",
}


@pytest.fixture(scope="session", autouse=True)
def _registered():
    device.register()


@pytest.fixture(autouse=True)
def _nothing_noted():
    device.crossings.clear()


def _rows(kind):
    labels = [[1, 2, 3], [4, 5]] if kind == "seq2seq" else [[1], [2]]
    if kind == "causal":
        labels = [list(range(1, 12)), list(range(3, 10))]
    return [Tokens(list(range(1, 12)), labels[0], ""), Tokens(list(range(3, 10)), labels[1], "")]


def _steps(name, where, storage="", update=None, again=0):
    """The losses of three steps, and what they brought over or waited for."""
    model = tiny.build(name)
    kind = {"t5": "seq2seq", "bert": "classification"}.get(name, "causal")
    if storage:
        quantise_linear_layers(model, storage=storage)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # whose numbers are the device's own
            module.p = 0.0
    model.to(where)
    torch.manual_seed(1)
    veneer.attach(model, update or veneer.LoRA(rank=4)).train()
    rows = _rows(kind)
    loss = Loss(model, 0, rows[0], kind=kind, smoothing=0.1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, foreach=False)
    losses = []
    for step in range(3):
        if step == 1:  # what is made once is there
            device.crossings.clear()
        with recomputed(model, again), fused_passes(model), loss.attention():
            value = loss(rows)
            value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())
    found = set(device.crossings)
    return [float(value) for value in losses], found


CASES = [(name, "", 0.0, 0) for name in tiny.ARCHITECTURES]
CASES += [("llama", storage, dropout, 1) for storage, dropout in (("", 0.1), ("nf4", 0.1), ("int8", 0.0))]


@pytest.mark.parametrize(("name", "storage", "dropout", "again"), CASES)
def test_three_steps_are_the_cpus(name, storage, dropout, again):
    update = veneer.LoRA(rank=4, dropout=dropout)
    expected, none = _steps(name, "cpu", storage, update, again)
    made, crossed = _steps(name, device.NAME, storage, update, again)
    assert none == set()
    assert made == pytest.approx(expected, rel=2e-6), "the definitions serve here, and the C++ kernels there"
    assert crossed <= ALLOWED.keys()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(7, 96), (300, 64)])
def test_codes_and_scales_are_the_cpus(storage, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected = blockwise.quantise(weight, storage=storage)
    made = blockwise.quantise(weight.to(device.NAME), storage=storage)
    for part in ("codes", "scales", "nested_scales", "offset"):
        assert getattr(made, part).device.type == device.NAME
        assert torch.equal(getattr(made, part).cpu(), getattr(expected, part)), part
    assert torch.equal(blockwise.dense(made).cpu(), blockwise.dense(expected))


def test_tables_come_over_once():
    weight = blockwise.quantise(torch.randn(8, 64)).__class__(
        **{
            name: value.to(device.NAME) if isinstance(value, torch.Tensor) else value
            for name, value in vars(blockwise.quantise(torch.randn(8, 64))).items()
        }
    )
    blockwise.dense(weight)
    device.crossings.clear()
    blockwise.dense(weight)
    assert device.crossings == []


def test_a_layer_in_codes_moves_each_tensor_once():
    layer = QuantisedLinear.of(nn.Linear(64, 8))
    layer.to(device.NAME)
    assert len([what for what, _ in device.crossings if what == "to device"]) <= 6  # and an empty one, for its type
    assert {tensor.device.type for tensor in layer.buffers()} == {device.NAME}
    scales = layer.nested_scales.cpu()
    assert torch.equal(layer.to(torch.bfloat16).nested_scales.cpu(), scales), "in fp32, as the codes were made with"


@pytest.mark.parametrize("signed", [True, False])
def test_moments_in_8_bits(signed):
    moment = torch.rand(600, generator=torch.Generator().manual_seed(4))
    results = []
    for where in ("cpu", device.NAME):
        codes = torch.empty(600, dtype=torch.uint8, device=where)
        scales = torch.empty(3, device=where)
        eight_bit.code(moment.to(where), codes, scales, signed=signed)
        results.append([x.cpu() for x in (codes, scales, eight_bit.decode(codes, scales, signed=signed))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_step_where_there_is_no_float64(monkeypatch):
    expected, _ = _steps("llama", "cpu")
    monkeypatch.setattr(device, "without_doubles", True)
    monkeypatch.setattr("veneer.device._WITHOUT_DOUBLES", {device.NAME})
    made, _ = _steps("llama", device.NAME)
    assert made == pytest.approx(expected, rel=2e-6)


# Not of a dense storage: with such a device, transformers leaves buffers of what it loads without values.
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_model_is_loaded_onto_it(storage, tiny_folder, monkeypatch):
    """Each weight is quantised there, one after another, to the CPU's bytes."""
    expected, _ = load(tiny_folder, storage, compute="fp32")
    monkeypatch.setattr("veneer.models.load.available", str)
    made, _ = load(tiny_folder, storage, compute="fp32", device=device.NAME)
    mine, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (made, expected))
    assert mine.keys() == theirs.keys()
    assert {tensor.device.type for tensor in mine.values()} == {device.NAME}
    assert [name for name in mine if not torch.equal(mine[name].cpu(), theirs[name])] == []
    ids = torch.arange(1, 9)[None]
    logits = made(input_ids=ids.to(device.NAME)).logits.cpu()
    torch.testing.assert_close(logits, expected(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
