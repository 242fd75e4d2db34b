""" "all-linear" is all that can be adapted; the rest is named."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf
from torch import nn

import tiny
import veneer
from veneer.errors import TargetError
from veneer.frozen.layers import quantise_linear_layers

pytestmark = pytest.mark.unit

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


def _attached(model, **options):
    """The names of what is adapted, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", veneer.VeneerWarning)
        veneer.attach(model, veneer.LoRA(rank=4, **options))
    said = [str(warning.message) for warning in caught if issubclass(warning.category, veneer.VeneerWarning)]
    return [row.name for row in veneer.trainable(model).rows], said


def _phimoe():
    return tf.PhimoeForCausalLM(
        tf.PhimoeConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4)
    ).eval()


def test_a_router_of_its_own_class_is_left_out_and_named():
    names, said = _attached(_phimoe())
    assert {name.rsplit(".", 1)[-1] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert said == [
        "all-linear leaves out model.layers.0.mlp.router and 1 more (a PhimoeTopKRouter, which cannot be adapted)."
    ]
    with pytest.raises(TargetError, match=r"mlp.router is a PhimoeTopKRouter, which cannot be adapted"):
        veneer.attach(_phimoe(), veneer.LoRA(targets=["router"]))


def test_the_projection_that_attention_reads_itself_is_left_out_and_named():
    names, said = _attached(nn.Sequential(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)))
    assert names == ["0.linear1", "0.linear2"]
    assert said == [
        "all-linear leaves out 0.self_attn.out_proj (a NonDynamicallyQuantizableLinear, which cannot be adapted)."
    ]


def test_a_projection_that_mamba_reads_itself_is_named():
    model = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))
    _, said = _attached(model)
    assert said == [
        "all-linear leaves out backbone.layers.0.mixer.dt_proj (the module around it reads its weight itself)."
    ]


def test_nothing_is_said_where_all_are_adapted():
    assert _attached(tiny.build("llama"))[1] == []
    assert _attached(_phimoe(), targets=["q_proj"])[1] == []


def test_falcon_is_adapted_bit_for_bit_and_merged():
    model, inputs = tf.FalconForCausalLM(tf.FalconConfig(**SIZES)).eval(), tiny.batch("falcon")
    base = tiny.logits(model, inputs)
    names, said = _attached(model)
    assert len(names) == 8
    assert said == []
    assert torch.equal(tiny.logits(model, inputs), base)
    tiny.train_steps(model, inputs)
    adapted = tiny.logits(model, inputs)
    veneer.merge(model)
    torch.testing.assert_close(tiny.logits(model, inputs), adapted, rtol=0, atol=1e-5)
    veneer.unmerge(model)
    assert torch.equal(tiny.logits(model, inputs), adapted)
    veneer.remove(model)
    assert torch.equal(tiny.logits(model, inputs), base)
    quantise_linear_layers(model)
    assert type(model.transformer.h[0].mlp.dense_h_to_4h).__name__ == "QuantisedLinear"


@pytest.mark.parametrize("name", ["wav2vec2", "clip"])
def test_models_without_an_input_embedding_are_adapted_and_merged(name):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    if name == "clip":
        part = {**sizes, "projection_dim": 16}
        config = tf.CLIPConfig(text_config={**part, "vocab_size": 64}, vision_config={**part, "image_size": 8,
                               "patch_size": 4}, projection_dim=16)  # fmt: skip
        model = tf.CLIPModel(config).eval()
        inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long), "pixel_values": torch.ones(2, 3, 8, 8)}
    else:
        convolutions = {"conv_dim": (16,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1}
        config = tf.Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
        model, inputs = tf.Wav2Vec2Model(config).eval(), {"input_values": torch.ones(2, 40)}

    @torch.no_grad()
    def answers():
        return model(**inputs)[0]

    veneer.attach(model, veneer.LoRA(rank=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    adapted = answers()
    veneer.merge(model)
    torch.testing.assert_close(answers(), adapted, rtol=1e-4, atol=1e-4)
    veneer.unmerge(model)
    assert torch.equal(answers(), adapted)
    with pytest.raises(TargetError, match="new_tokens needs a model with an input embedding"):
        veneer.attach(model, veneer.LoRA(targets=["q_proj"], new_tokens=[1]), "tokens")
