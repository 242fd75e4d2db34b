"""Embeddings and head in 16 bits beside a base in codes."""

from __future__ import annotations

import pytest
import torch

import tiny
import veneer
from tokens import tokenizer
from veneer.commands.quantize import quantise_to
from veneer.errors import ConfigError
from veneer.frozen.layers import storage_of
from veneer.models import load as loading
from veneer.planning.config import PlanOptions
from veneer.planning.plan import NO_MACHINE, plan

pytestmark = pytest.mark.unit


@pytest.fixture(params=["llama", "gpt2", "qwen3-moe"])
def folder(request, tmp_path):
    """A checkpoint in bf16, so that its values are the same in both types."""
    made = tiny.build(request.param)
    made.resize_token_embeddings(len(tokenizer()), mean_resizing=False)
    made.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_training_over_it_has_the_gradients_of_fp32(folder):
    grads, logits, sizes = [], [], []
    for dense in ("fp32", "bf16"):
        model, _ = veneer.load(folder, "nf4", dense_storage=dense)
        head = model.get_output_embeddings()
        assert {model.get_input_embeddings().weight.dtype, head.weight.dtype} == {loading.DTYPES[dense]}
        sizes.append(sum(tensor.nbytes for tensor in model.state_dict().values()))
        inputs = {key: tensor % 20 for key, tensor in tiny.batch("llama").items()}
        torch.manual_seed(0)
        veneer.attach(model, veneer.LoRA(rank=2, train_also=[]))
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(parameter, std=0.1)
        out = model(**inputs)
        out.loss.backward()
        logits.append(out.logits.detach())
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert torch.allclose(*logits, rtol=0, atol=1e-5)
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-4, atol=1e-6), name
    assert sizes[1] < sizes[0]


def test_it_is_merged_saved_generated_with_and_known_of(folder, tmp_path):
    model, tokens = veneer.load(folder, "nf4", dense_storage="bf16")
    assert storage_of(model)["dense_storage"] == "bf16"
    veneer.attach(model, veneer.LoRA(rank=2))
    tiny.train_steps(model, {key: tensor % 20 for key, tensor in tiny.batch("llama").items()})
    assert len(veneer.generate(model, tokens, ["hello"], max_new_tokens=3)) == 1
    ids = {"input_ids": tiny.batch("llama")["input_ids"] % 20}
    before = tiny.logits(model, ids)
    veneer.merge(model, reversible=False)
    assert torch.allclose(tiny.logits(model, ids), before, rtol=0, atol=2e-2)  # rounded to bf16
    model.save_pretrained(tmp_path / "merged")
    tokens.save_pretrained(tmp_path / "merged")
    again, _ = veneer.load(tmp_path / "merged", "bf16")
    assert torch.allclose(tiny.logits(again, ids), tiny.logits(model, ids), rtol=0, atol=1e-5)


def test_a_checkpoint_in_codes_takes_it_too(folder, tmp_path):
    quantise_to(folder, tmp_path / "coded")
    models = [veneer.load(tmp_path / "coded", **how)[0] for how in ({"dense_storage": "bf16"}, {"storage": "bf16"})]
    for model in models:
        assert model.get_input_embeddings().weight.dtype is torch.bfloat16


def test_it_is_refused_where_nothing_is_in_codes(folder):
    with pytest.raises(ConfigError, match=r"dense_storage = 'bf16' is for a base in codes \(nf4, fp4, int4, int8\)"):
        veneer.load(folder, dense_storage="bf16")
    with pytest.raises(ConfigError, match=r"dense_storage = 'nf4' is not one of fp32, bf16, fp16"):
        veneer.load(folder, "nf4", dense_storage="nf4")
    with pytest.raises(ConfigError, match="is for a base in codes"):
        plan(PlanOptions(model=str(folder), storage="fp32", dense_storage="bf16"), NO_MACHINE)


def test_a_plan_counts_it_to_the_byte(folder):
    model, _ = veneer.load(folder, "nf4", dense_storage="bf16")
    made = plan(PlanOptions(model=str(folder), storage="nf4", dense_storage="bf16", max_length=8), NO_MACHINE)
    held = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert made.terms["base, codes"] + made.terms["base, scales"] + made.terms["base, dense"] == sum(held.values())
