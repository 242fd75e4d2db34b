"""PiSSA beside the installed peft: the same start and the same training; what is saved loads there."""

from __future__ import annotations

import io

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tiny
import veneer
from veneer.errors import ConfigError, TargetError
from veneer.frozen.weight import frozen_weight
from veneer.models.original import OriginalWeights
from veneer.planning.config import PlanOptions
from veneer.planning.plan import NO_MACHINE, plan
from veneer.updates.record import updates_of

pytestmark = pytest.mark.interop


@pytest.mark.parametrize(
    ("name", "targets", "more"),
    [
        ("llama", ["q_proj", "down_proj"], {}),
        (
            "llama",
            ["q_proj", "v_proj"],
            {"rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        ),
        ("gpt2", ["c_attn"], {}),
    ],
)
def test_start_training_and_file_are_pefts(name, targets, more, tmp_path):
    ours, inputs = tiny.build(name), tiny.batch(name)
    before, base = tiny.logits(ours, inputs), tiny.state(ours)
    veneer.attach(ours, veneer.LoRA(rank=4, alpha=6, targets=targets, init="pissa", **more))
    torch.testing.assert_close(tiny.logits(ours, inputs), before, rtol=0, atol=2e-6)
    patterns = {key: value for key, value in more.items() if key != "rslora"}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights="pissa", use_rslora="rslora" in more,
        fan_in_fan_out=name == "gpt2", **patterns,
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny.build(name), config).eval()
    named = dict(theirs.named_parameters())
    for path, update in updates_of(ours, "default").items():
        for part, own in (("A", update.A), ("B", update.B.t())):
            its = named[f"base_model.model.{path}.lora_{part}.default.weight"]
            its = its if part == "A" else its.t()
            signs = (own * its).sum(1, keepdim=True).sign()  # of singular vectors, free
            torch.testing.assert_close(own * signs, its, rtol=1e-3, atol=1e-5)
            with torch.no_grad():  # AdamW would go with the sign
                its.copy_(own)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        tiny.train_steps(model, inputs)
    trained = tiny.logits(ours, inputs)
    assert (trained - before).abs().max() > 0.05
    torch.testing.assert_close(trained, tiny.logits(theirs, inputs), rtol=0, atol=1e-4)

    veneer.save(ours, tmp_path / "a")
    for loaded in (peft.PeftModel.from_pretrained(tiny.build(name), tmp_path / "a").eval(), tiny.build(name)):
        if not isinstance(loaded, peft.PeftModel):
            veneer.load_adapter(loaded, tmp_path / "a")
        torch.testing.assert_close(tiny.logits(loaded, inputs), trained, rtol=0, atol=2e-6)
    veneer.merge(ours)
    torch.testing.assert_close(tiny.logits(ours, inputs), trained, rtol=0, atol=2e-6)
    veneer.unmerge(ours)
    veneer.export(tmp_path / "a", tmp_path / "plain")
    veneer.remove(ours)
    assert tiny.same_state(ours, base)


def test_over_codes_what_is_left_of_the_weight_is_quantised(tiny_folder, tmp_path):
    model, tokenizer = veneer.load(tiny_folder, storage="nf4")
    exact, weights = veneer.load(tiny_folder)[0], OriginalWeights(model)
    paths = [path for path, module in model.named_modules() if hasattr(module, "codes")]
    before = {path: (weights.read(path) - model.get_submodule(path).frozen().dense()).norm() for path in paths}
    veneer.attach(model, veneer.LoRA(rank=8, init="pissa"))
    for path, update in updates_of(model, "default").items():
        whole = frozen_weight(model.get_submodule(path).base).dense() + update.scale * update.B @ update.A
        assert (exact.get_submodule(path).weight - whole).norm() < 0.95 * before[path]
    inputs = {key: value % 250 for key, value in tiny.batch("llama").items()}
    tiny.train_steps(model, inputs)
    with pytest.raises(TargetError, match=r"init = 'pissa' changed the base, which this adapter needs; save it first"):
        veneer.save(model, tmp_path / "a")
    with pytest.raises(TargetError, match="init = 'pissa' changed the base, so it cannot be given back"):
        veneer.remove(model)
    veneer.save_base(model, tokenizer, tmp_path / "base")
    veneer.save(model, tmp_path / "a")
    again, _ = veneer.load(tmp_path / "base", storage="nf4")
    veneer.load_adapter(again, tmp_path / "a")
    assert torch.equal(tiny.logits(again, inputs), tiny.logits(model, inputs))
    assert veneer.trainable(model).rows[0].rank == 8


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_run_goes_on_to_the_same_bytes(storage, tiny_folder, rows_file, tmp_path):
    def trained(name, steps, **more):
        return veneer.train(
            str(tiny_folder), data=str(rows_file), output=str(tmp_path / name), rank=2, batch_size=8, held_out=8,
            learning_rate=1e-2, schedule="constant", warmup=0, checkpoint_every=2, evaluate_every=0, init="pissa",
            storage=storage, steps=steps, console=Console(file=io.StringIO()), **more,
        ).folder  # fmt: skip

    whole, part = trained("whole", 4), trained("part", 2)
    veneer.resume(part, steps=4, console=Console(file=io.StringIO()))
    files = [folder / "adapter/adapter_model.safetensors" for folder in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()
    ranks = {len(tensor) for key, tensor in load_file(files[0]).items() if "lora_A" in key}
    assert ranks == {4 if storage == "fp32" else 2}
    if storage == "nf4":
        return
    result = veneer.train(
        data=str(rows_file), output=str(tmp_path / "next"), adapter=str(whole), steps=1, held_out=8,
        console=Console(file=io.StringIO()),
    )  # fmt: skip
    assert result.steps == 1


def test_the_plan_has_the_directions_that_stay(tiny_folder):
    asked = {"model": str(tiny_folder), "rank": 8, "batch_size": 4, "max_length": 64}
    plain, pissa = (plan(PlanOptions(**asked, init=init), NO_MACHINE) for init in ("kaiming", "pissa"))
    assert pissa.parameters == plain.parameters
    assert pissa.training - plain.training >= 4 * plain.parameters
    plan(PlanOptions(**asked, init="pissa", storage="nf4"), NO_MACHINE)


def test_what_cannot_be_is_refused(tiny_folder):
    with pytest.raises(TargetError, match="embed_tokens is an Embedding, and init = 'pissa' is for linear layers"):
        veneer.attach(tiny.build("llama"), veneer.LoRA(targets=["embed_tokens", "q_proj"], init="pissa"))
    with pytest.raises(TargetError, match="is a parameter of experts, whose updates do not start from their weights"):
        veneer.attach(tiny.build("mixtral"), veneer.LoRA(targets=["down_proj"], init="pissa"))
    with pytest.raises(ConfigError, match="init = 'pissa' takes some out of it; choose one"):
        veneer.LoRA(init="pissa", dora=True)
    coded, _ = veneer.load(tiny_folder, storage="nf4")
    with pytest.raises(TargetError, match="lm_head is dense here: leave it out with exclude"):
        veneer.attach(coded, veneer.LoRA(targets=["q_proj", "lm_head"], init="pissa"))
    eight, _ = veneer.load(tiny_folder, storage="int8")
    with pytest.raises(TargetError, match="could not be saved in int8; use nf4 or fp4"):
        veneer.attach(eight, veneer.LoRA(init="pissa"))
    assert not any(hasattr(module, "updates") for module in coded.modules())
