"""LoftQ's initial values against peft's, whose own runs on a GPU only: its decomposition, of bitsandbytes' loss."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from peft.utils.loftq_utils import _low_rank_decomposition

import veneer
from tokens import tokenizer
from veneer.frozen.layers import linear_layers
from veneer.updates.record import updates_of

pytestmark = pytest.mark.interop


def test_the_update_is_pefts(tmp_path):
    """As in peft.utils.loftq_utils.replace_lora_weights_loftq: the base's codes stay, A and B hold the residual."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(tokenizer()), **sizes)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    plain, _ = veneer.load(tmp_path)
    weights = {name: plain.get_submodule(name).weight.detach() for name in linear_layers(plain)}
    model, _ = veneer.load(tmp_path, storage="nf4", double_quantisation=False)
    veneer.attach(model, veneer.LoRA(rank=4, alpha=4, init="loftq"))
    updates = updates_of(model, "default")
    assert updates.keys() == weights.keys()
    for name, update in updates.items():
        codes, state = bnb.functional.quantize_4bit(weights[name], quant_type="nf4", blocksize=64)
        lost = weights[name] - bnb.functional.dequantize_4bit(codes, state)
        peft = _low_rank_decomposition(lost, reduced_rank=4)
        torch.testing.assert_close(update.B @ update.A, peft["L"] @ peft["R"], rtol=0, atol=1e-6)
        for mine, its in ((update.A, peft["R"]), (update.B.t(), peft["L"].t())):
            signs = (mine * its).sum(1, keepdim=True).sign()  # of singular vectors, free
            torch.testing.assert_close(mine * signs, its, rtol=1e-3, atol=1e-5)
