"""Hooks on modules that are adapted: called as often, and with the same effect, as under peft."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import tiny
import veneer

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("method", ["LoRA", "AdaLoRA"])
def test_hooks_on_adapted_modules_are_called_as_under_peft(method, tmp_path):
    model, batch, calls = tiny.build("llama"), tiny.batch("llama"), []
    inputs = {"input_ids": batch["input_ids"]}  # peft's AdaLoRA adds to a loss

    def tripled(module, arguments, output):
        calls.append(module)
        return output * 3

    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(tripled)
        layer.mlp.up_proj.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 0.1,))
    base, other = tiny.logits(model, inputs), copy.deepcopy(model)
    calls.clear()
    options = {"total_steps": 9, "initial_rank": 4, "target_rank": 2} if method == "AdaLoRA" else {"rank": 4}
    veneer.attach(model, getattr(veneer, method)(**options))
    assert torch.equal(tiny.logits(model, inputs), base)
    assert len(calls) == 2
    tiny.train_steps(model, batch)
    veneer.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(theirs, inputs), rtol=0, atol=2e-5)
