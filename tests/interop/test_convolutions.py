"""Convolutions as PEFT has them: zero update, files both ways, gradients, merge; and what cannot be, by name."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import veneer
from veneer.errors import AdapterFileError, TargetError
from veneer.updates.record import row_adapters, updates_of

pytestmark = pytest.mark.interop

_X = {1: (2, 4, 9), 2: (2, 4, 9, 8), 3: (2, 4, 5, 6, 7)}
_CASES = [
    (1, {"kernel_size": 3}),
    (1, {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2}),
    (2, {"kernel_size": (3, 5), "stride": (1, 2), "padding": (1, 2)}),
    (2, {"kernel_size": 1, "bias": False}),
    (2, {"kernel_size": 3, "padding": "same"}),
    (2, {"kernel_size": 3, "groups": 4}),
    (3, {"kernel_size": (1, 2, 3), "padding": 1}),
]


def _model(dims, seed=0, **how):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Module()
        model.conv = getattr(nn, f"Conv{dims}d")(4, 8, **how)
        model.act = nn.Tanh()
        model.lin = nn.Linear(8, 3)
        model.__class__ = _Model
    return model


class _Model(nn.Module):
    def forward(self, x):
        return self.lin(self.act(self.conv(x)).flatten(2).mean(-1))


def _same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dims", "how"), _CASES)
def test_output_gradients_files_and_merge_are_pefts(dims, how, tmp_path):
    model, x = _model(dims, **how), torch.randn(_X[dims])
    before = model(x)
    veneer.attach(model, veneer.LoRA(rank=4, alpha=6, targets=["conv", "lin"]))
    assert torch.equal(model(x), before)
    for update in updates_of(model, "default").values():
        nn.init.normal_(update.B, std=0.3)
    veneer.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(_model(dims, **how), tmp_path / "ours", is_trainable=True)
    expected = model(x)
    _same(theirs(x), expected)
    assert not torch.allclose(expected, before, atol=1e-2)
    for one in (model, theirs):
        one(x).square().sum().backward()
    layer, update = theirs.base_model.model.conv, updates_of(model, "default")["conv"]
    _same(update.A.grad, layer.lora_A["default"].weight.grad)
    _same(update.B.grad, layer.lora_B["default"].weight.grad)

    theirs.save_pretrained(tmp_path / "theirs")
    back = _model(dims, **how)
    veneer.load_adapter(back, tmp_path / "theirs")
    assert torch.equal(back(x), expected)
    if how.get("groups", 1) > 1:
        with pytest.raises(
            TargetError, match=r"conv is a Conv\dd of \d groups, whose update is no convolution of these"
        ):
            veneer.merge(back)
        assert torch.equal(back(x), expected)
        return
    veneer.merge(back)
    assert type(back.conv) is type(_model(dims, **how).conv)
    torch.testing.assert_close(back(x), expected, rtol=0, atol=2e-6)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(back.conv.weight, merged.conv.weight, rtol=0, atol=1e-6)
    veneer.unmerge(back)
    assert torch.equal(back(x), expected)


def test_training_moves_it_and_removing_gives_the_base_back():
    model, x = _model(2, kernel_size=3), torch.randn(_X[2])
    before, conv = model(x), model.conv
    veneer.attach(model, veneer.LoRA(rank=2, targets=["conv"], dropout=0.2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert model.eval()(x).square().sum().item() < before.square().sum().item()
    assert veneer.trainable(model).rows[0].shape == (8, 4, 3, 3)
    assert veneer.trainable(model).parameters == 2 * 4 * 9 + 8 * 2
    veneer.remove(model)
    assert model.conv is conv
    assert torch.equal(model(x), before)


def test_in_16_bits_under_autocast():
    model, x = _model(2, kernel_size=3).bfloat16(), torch.randn(_X[2]).bfloat16()
    veneer.attach(model, veneer.LoRA(rank=2, targets=["conv"]))
    update = updates_of(model, "default")["conv"]
    assert update.A.dtype is torch.float32
    assert model(x).dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).sum().backward()
    assert update.B.grad.dtype is torch.float32


def test_a_model_that_begins_with_one():
    """ViT cuts its images into patches by a convolution."""
    config = tf.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = tf.ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 8, 8)
    before = model(images).logits
    veneer.attach(model, veneer.LoRA(rank=2, targets=["projection"]))
    with torch.no_grad():
        assert torch.equal(model(images).logits, before)
        (update,) = (u for u in updates_of(model, "default").values() if hasattr(u, "A"))
        nn.init.normal_(update.B)
        assert not torch.equal(model(images).logits, before)


def test_what_cannot_be_is_refused(tmp_path):
    said = {
        "padding circular, which PEFT leaves out of its updates": {"padding_mode": "circular", "padding": 1},
        r"dilation \(2,\), which PEFT leaves out of its updates": {"dilation": 2},
        "groups, among which rank 3 cannot be shared out; use a multiple of 2": {"groups": 2},
    }
    for match, how in said.items():
        with pytest.raises(TargetError, match=match):
            veneer.attach(_model(1, kernel_size=3, **how), veneer.LoRA(rank=3, targets=["conv"]))
    for match, config in {
        "conv is a Conv1d, which AdaLoRA does not adapt": veneer.AdaLoRA(targets=["conv"], total_steps=10),
        "conv is a Conv1d, and dora is for linear layers": veneer.LoRA(targets=["conv"], dora=True),
        "conv is a Conv1d, and init = 'pissa' is for linear layers": veneer.LoRA(targets=["conv"], init="pissa"),
    }.items():
        with pytest.raises(TargetError, match=match):
            veneer.attach(_model(1, kernel_size=3), config)
    model = _model(1, kernel_size=3)
    veneer.attach(model, veneer.LoRA(rank=2, targets=["conv"]))
    veneer.save(model, tmp_path / "a")
    with pytest.raises(AdapterFileError, match=r"adapts convolutions \(conv\), which no plain LoRA can carry"):
        veneer.export(tmp_path / "a", tmp_path / "plain")
    with pytest.raises(AdapterFileError, match=r"lora_A.weight is \(2, 4, 3\) in the file and \(2, 4, 5\) here"):
        veneer.load_adapter(_model(1, kernel_size=5), tmp_path / "a")
    assert "conv" not in {row.name for row in _all_linear()}


def _all_linear():
    model = _model(1, kernel_size=3)
    veneer.attach(model, veneer.LoRA(rank=2))
    return veneer.trainable(model).rows


def test_rows_with_adapters_of_their_own_are_refused():
    model, x = _model(1, kernel_size=3), torch.randn(_X[1])
    for name in ("a", "b"):
        veneer.attach(model, veneer.LoRA(rank=2, targets=["conv"]), name)
    with row_adapters(model, [("a",), ("a",)], width=9):
        model(x)
    with (
        row_adapters(model, [("a",), ("b",)], width=9),
        pytest.raises(
            veneer.VeneerError, match="A convolution of this model is adapted, and computes all rows together"
        ),
    ):
        model(x)
