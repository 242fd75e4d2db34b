"""LoRA+'s groups beside peft's, and NEFTune's noise beside transformers' hook."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers.integrations.neftune import neftune_post_forward_hook

import tiny
import veneer
from veneer.training.noise import noise_on_embeddings

pytestmark = pytest.mark.interop


@pytest.mark.parametrize(
    "options", [{"train_also": ["lm_head"]}, {"dora": True, "targets": ["q_proj", "embed_tokens"]}]
)
def test_the_steps_are_those_of_pefts_optimizer(options, tmp_path):
    """Three steps of AdamW; the rate of embeddings, which peft has as an option, is that of A."""
    ours, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.attach(ours, veneer.LoRA(rank=4, **options))
    tiny.train_steps(ours, inputs, steps=1)
    veneer.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path, is_trainable=True).eval()
    optimizers = (
        torch.optim.AdamW(veneer.lora_plus(ours, 0.01, 16), weight_decay=0.0),
        create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16, loraplus_lr_embedding=0.01, weight_decay=0.0
        ),
    )
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    torch.testing.assert_close(tiny.logits(ours, inputs), tiny.logits(theirs, inputs), rtol=0, atol=2e-4)
    before = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()
    assert (tiny.logits(before, inputs) - tiny.logits(ours, inputs)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_the_noise_of_rows_of_one_length_is_transformers(name):
    model, inputs = tiny.build(name).train(), tiny.batch(name)
    embedding = (model.get_encoder() if name == "t5" else model).get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    hook = embedding.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(0)
    theirs = embedding(inputs["input_ids"])
    hook.remove()
    torch.manual_seed(0)
    with noise_on_embeddings(model, 5.0, [inputs["input_ids"].shape[1]] * 3):
        ours = embedding(inputs["input_ids"])
        again = embedding(inputs["input_ids"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.equal(ours, again), "once a pass: a decoder's tokens have none"
    assert torch.equal(again, embedding(inputs["input_ids"]))
