"""Where a module's rank stands in the picture."""

from __future__ import annotations

import pytest

import tiny
import veneer
from veneer.reporting.heatmap import RankMap

pytestmark = pytest.mark.unit

KINDS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "t5": [
        *(f"{side}.block.layer.0.SelfAttention.{part}" for side in ("encoder", "decoder") for part in "qkvo"),
        *(f"EncDecAttention.{part}" for part in "qkvo"),
        "1.DenseReluDense.wi",
        "1.DenseReluDense.wo",
        "2.DenseReluDense.wi",
        "2.DenseReluDense.wo",
    ],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"],
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_module_is_one_column_through_all_layers(name):
    model = tiny.build(name)
    veneer.attach(model, veneer.LoRA(rank=2))
    ranks = {row.name: row.rank for row in veneer.trainable(model).rows if row.rank is not None}
    found = RankMap.of(ranks)
    assert sorted(found.kinds) == sorted(KINDS[name])
    assert [layer for layer in found.layers if layer >= 0] == [0, 1]
    if name != "t5":  # whose encoder has other parts than its decoder
        assert all((layer, kind) in found.cells for layer in (0, 1) for kind in found.kinds if kind != "pooler.dense")
