"""What Veneer writes, plain transformers reads: merged models, from any storage of the base."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import tiny
import veneer
from tokens import tokenizer

pytestmark = pytest.mark.interop

_AUTO = {"bert": tf.AutoModelForSequenceClassification, "t5": tf.AutoModelForSeq2SeqLM}


def _inputs(name):
    inputs = tiny.batch(name)
    return {"input_ids": inputs["input_ids"], "decoder_input_ids": inputs["input_ids"]} if name == "t5" else inputs


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_merged_model_reloads_with_the_adapted_models_logits(name, storage, tmp_path):
    made = tokenizer()
    for part in (tiny.build(name), made):
        part.save_pretrained(tmp_path / "base")
    model, _ = veneer.load(tmp_path / "base", storage)
    base = tiny.logits(model, _inputs(name))
    veneer.attach(model, veneer.LoRA(rank=4))
    tiny.train_steps(model, tiny.batch(name))
    adapted = tiny.logits(model, _inputs(name))
    assert (adapted - base).abs().max() > 1e-3
    veneer.merge(model)
    model.save_pretrained(tmp_path / "merged")
    again = _AUTO.get(name, tf.AutoModelForCausalLM).from_pretrained(tmp_path / "merged")
    assert type(again) is type(tiny.build(name))
    torch.testing.assert_close(tiny.logits(again, _inputs(name)), adapted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("storage", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_half_precision_base_keeps_its_type(tiny_folder, storage, dtype, tmp_path):
    model, _ = veneer.load(tiny_folder, storage)
    veneer.attach(model, veneer.LoRA(rank=4))
    tiny.train_steps(model, tiny.batch("llama"))
    veneer.merge(model)
    merged = tiny.logits(model, tiny.batch("llama"))
    model.save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.dtype == dtype
    ours = model.state_dict()
    assert [key for key, tensor in again.state_dict().items() if not torch.equal(tensor, ours[key].to(dtype))] == []
    # Multiplied in fp32 or bf16 here, whichever is faster, and in the type of the file there.
    torch.testing.assert_close(tiny.logits(again, tiny.batch("llama")).float(), merged.float(), rtol=0.02, atol=0.02)
