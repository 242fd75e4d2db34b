"""Embeddings that multiply what they look up by a plain number (XGLM, BioGPT, BART): as under peft."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import architectures
import veneer
from veneer.updates.layers import embedding_factor

pytestmark = pytest.mark.interop


@torch.no_grad()
def _output(model, inputs):
    return architectures.output(model, inputs)


@pytest.mark.parametrize("options", [{"targets": ["embed_tokens"]}, {"targets": ["q_proj"], "new_tokens": [5, 9]}])
@pytest.mark.parametrize("name", ["xglm", "biogpt"])
def test_updates_are_scaled_with_the_rows(name, options, tmp_path):
    base, inputs = architectures.made(name)
    inputs["input_ids"][0, :2] = torch.tensor([5, 9])
    model = veneer.attach(copy.deepcopy(base), veneer.LoRA(rank=4, **options))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.base.embed_scale, float)
    assert embedding_factor(embedding.base) == 32**0.5
    with torch.no_grad():
        for parameter in embedding.updates.parameters():
            parameter.add_(0.1)
    adapted = _output(model, inputs)
    assert (adapted - _output(base, inputs)).abs().max() > 0.01
    veneer.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(_output(theirs, inputs), adapted, rtol=1e-4, atol=1e-4)
    veneer.merge(model)
    torch.testing.assert_close(_output(model, inputs), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bart-scaled", "m2m100"])
def test_embeddings_of_pairs_are_adapted(name):
    model, inputs = architectures.made(name)
    before = _output(model, inputs)
    veneer.attach(model, veneer.LoRA(rank=4, targets=["embed_tokens"]))
    assert torch.equal(_output(model, inputs), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("updates.default.A"):
                parameter.add_(0.1)
    assert (_output(model, inputs) - before).abs().max() > 0.01
