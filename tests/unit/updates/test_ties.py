"""Weights that several modules hold: new tokens reach all of them, a merged model is written so that it reloads."""

from __future__ import annotations

import pytest
import torch

import tiny
import veneer
from veneer.errors import TargetError
from veneer.updates.layers import NewRows

pytestmark = pytest.mark.unit

_BOTH = ["t5", *(name for name in tiny.TIED if name != "bert-mlm")]


def _trained(name, **options):
    model, inputs = tiny.build(name), tiny.batch(name)
    veneer.attach(model, veneer.LoRA(rank=4, **options))
    tiny.train_steps(model, inputs)
    return model, inputs


def _reloaded(model, folder):
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return again.eval()


def _encoded(model, token):
    with torch.no_grad():
        return model.get_encoder()(input_ids=torch.full((1, 4), token)).last_hidden_state


@pytest.mark.parametrize("name", _BOTH)
def test_new_tokens_reach_an_encoder_a_decoder_and_the_head(name, tmp_path):
    model, inputs = tiny.build(name), tiny.batch(name)
    base, encoded, other = tiny.logits(model, inputs), _encoded(model, 5), _encoded(model, 6)
    target = "q" if name.endswith("t5") else "q_proj"
    veneer.attach(model, veneer.LoRA(rank=4, targets=[target], new_tokens=[5]))
    assert torch.equal(tiny.logits(model, inputs), base)
    (rows,) = {update for update in model.modules() if isinstance(update, NewRows)}
    with torch.no_grad():
        rows.rows.add_(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    assert (_encoded(model, 5) - encoded).abs().max() > 1e-2
    assert torch.equal(_encoded(model, 6), other)
    changed = (tiny.logits(model, inputs) - base).abs()
    assert changed[..., 5].max() > 1e-2, "the head's side"
    with torch.no_grad():
        decoded = model(input_ids=torch.tensor([[7, 8]]), decoder_input_ids=torch.tensor([[5, 7]])).logits
    veneer.save(model, tmp_path / "a")
    again = tiny.build(name)
    veneer.load_adapter(again, tmp_path / "a")
    adapted = tiny.logits(model, inputs)
    assert torch.equal(tiny.logits(again, inputs), adapted)
    veneer.merge(model)
    torch.testing.assert_close(tiny.logits(model, inputs), adapted, rtol=0, atol=1e-5)
    with torch.no_grad():
        merged = model(input_ids=torch.tensor([[7, 8]]), decoder_input_ids=torch.tensor([[5, 7]])).logits
    torch.testing.assert_close(merged, decoded, rtol=0, atol=1e-5)
    again = _reloaded(model, tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(again, inputs), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", _BOTH)
def test_an_embedding_that_only_lends_its_weight_is_refused(name):
    linear = {"t5": "wi", "umt5": "wi_0"}.get(name, "fc1")
    match = r"shared is never called: it only lends its weight to .*encoder.embed_tokens and .*decoder.embed_tokens, so"
    for options in ({"targets": ["shared"]}, {"targets": [linear], "train_also": ["shared"]}):
        model = tiny.build(name)
        before = tiny.state(model)
        with pytest.raises(TargetError, match=match):
            veneer.attach(model, veneer.LoRA(**options))
        assert tiny.same_state(model, before)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *((name, ["lm_head"]) for name in _BOTH),
        *((name, ["embed_tokens"]) for name in _BOTH),
        ("bert-mlm", ["word_embeddings", "query"]),
        ("bert-mlm", ["cls.predictions.decoder"]),
        ("gemma3", ["embed_tokens"]),
    ],
)
def test_a_merged_model_with_one_of_the_tied_adapted_reloads_equal(name, targets, tmp_path):
    model, inputs = _trained(name, targets=targets)
    adapted, keys = tiny.logits(model, inputs), tiny.build(name).state_dict().keys()
    veneer.merge(model)
    merged = tiny.logits(model, inputs)
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == keys
    again = _reloaded(model, tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(again, inputs), merged, rtol=0, atol=1e-6)
    veneer.unmerge(model)
    assert torch.equal(tiny.logits(model, inputs), adapted)
    veneer.remove(model)
    assert tiny.same_state(model, tiny.state(tiny.build(name)))
    held = list(model.parameters())
    assert len(held) == len(list(tiny.build(name).parameters())), "what was tied is tied again"
    assert model.config.tie_word_embeddings


def test_the_rows_of_an_untied_head_are_trained_and_saved_too(tmp_path):
    model, inputs = _trained("llama", targets=["q_proj"], new_tokens=[5, 9])
    rows = {row.name: row.parameters for row in veneer.trainable(model).rows if row.rank is None}
    assert rows == {"model.embed_tokens": 64, "lm_head": 64}
    head = model.lm_head.updates["default"].rows
    assert (head - model.lm_head.weight[[5, 9]]).abs().max() > 1e-3
    adapted = tiny.logits(model, inputs)
    veneer.save(model, tmp_path / "a")
    again = tiny.build("llama")
    veneer.load_adapter(again, tmp_path / "a", trainable=True)
    assert torch.equal(tiny.logits(again, inputs), adapted)
    veneer.merge(model)
    torch.testing.assert_close(tiny.logits(model, inputs), adapted, rtol=0, atol=1e-5)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_head_that_is_trained_otherwise_gets_no_rows():
    model, _ = _trained("llama", targets=["q_proj"], train_also=["lm_head"], new_tokens=[5])
    assert {row.name: row.parameters for row in veneer.trainable(model).rows if row.rank is None} == {
        "model.embed_tokens": 32,
        "lm_head": 64 * 32,
    }
