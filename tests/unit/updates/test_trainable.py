"""The table of what is trained."""

from __future__ import annotations

import pytest
from torch import nn

import tiny
import veneer

pytestmark = pytest.mark.unit


def test_4096_square_at_rank_8():
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta"))
    model.to_empty(device="cpu")
    veneer.attach(model, veneer.LoRA(rank=8, targets=["0"]))
    table = veneer.trainable(model)
    assert (table.parameters, table.base_parameters) == (65_536, 16_777_216)
    assert table.share == pytest.approx(0.00390625)
    assert str(table).splitlines()[-1] == "65,536 of 16,777,216 parameters are trained (0.391 %)"
    (row,) = table.rows
    assert (row.name, row.shape, row.rank, row.parameters) == ("0", (4096, 4096), 8, 65_536)


def test_layers_of_one_kind_are_one_line():
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj", "lm_head"]))
    lines = str(veneer.trainable(model)).splitlines()
    assert len(lines) == 4
    assert "model.layers.*.self_attn.q_proj (×2)" in lines[1]


def test_a_tied_matrix_counts_once():
    tied, untied = tiny.build("llama-tied"), tiny.build("llama")
    for model in (tied, untied):
        veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]))
        counted = {id(p): p.numel() for path, p in model.named_parameters() if "updates" not in path}
        assert veneer.trainable(model).base_parameters == sum(counted.values())


def test_a_plain_model_is_trained_whole():
    model = tiny.build("llama")
    assert veneer.trainable(model).share == 1.0
    model.requires_grad_(False)
    assert veneer.trainable(model).parameters == 0
