"""attach → step → save → load → merge on a tiny model of every architecture."""

from __future__ import annotations

import pytest
import torch

import tiny
import veneer

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_life_of_an_adapter(name, tmp_path):
    model, inputs = tiny.build(name), tiny.batch(name)
    before, base = tiny.state(model), tiny.logits(model, inputs)

    veneer.attach(model, veneer.LoRA(rank=4, alpha=8))
    assert torch.equal(tiny.logits(model, inputs), base), "the output at step 0 is the base's, bit for bit"
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".updates.default." in path for path in trained)

    first = tiny.train_steps(model, inputs, steps=1)
    last = tiny.train_steps(model, inputs, steps=5)
    assert last < first
    adapted = tiny.logits(model, inputs)
    assert (adapted - base).abs().max() > 1e-3

    veneer.save(model, tmp_path / "adapter")
    other = tiny.build(name)
    veneer.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(tiny.logits(other, inputs), adapted)
    assert not any(parameter.requires_grad for parameter in other.parameters())

    veneer.merge(model)
    torch.testing.assert_close(tiny.logits(model, inputs), adapted, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == before.keys(), "a merged model has the base's own modules"
    model.save_pretrained(tmp_path / "merged")
    reloaded = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(reloaded, inputs), adapted, rtol=0, atol=1e-5)
    veneer.unmerge(model)
    assert torch.equal(tiny.logits(model, inputs), adapted)

    with veneer.disabled(model):
        assert torch.equal(tiny.logits(model, inputs), base)
    veneer.remove(model)
    assert tiny.same_state(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_checkpointing_trains_the_adapters(name):
    model, inputs = tiny.build(name), tiny.batch(name)
    veneer.attach(model, veneer.LoRA(rank=4))

    def gradients():
        model.zero_grad()
        model.train()
        torch.manual_seed(0)
        model(**inputs).loss.backward()
        return {path: p.grad.clone() for path, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for path, gradient in plain.items():
        torch.testing.assert_close(checkpointed[path], gradient, rtol=1e-5, atol=1e-7)
