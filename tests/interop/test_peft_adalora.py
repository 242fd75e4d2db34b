"""AdaLoRA beside the installed peft: the triplets it keeps, and adapters that cross in both directions."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import tiny
import veneer

pytestmark = pytest.mark.interop

STEPS, FINAL = 50, 5
_TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query", "dense"]}


def _theirs(model, targets, steps=STEPS, **options):
    # Without a task peft's own forward, which adds the regulariser, is passed by.
    task = "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"
    config = peft.AdaLoraConfig(
        task_type=task, init_r=4, target_r=2, lora_alpha=6, total_step=steps, tinit=5, tfinal=FINAL,
        target_modules=targets, **options,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def _ours(model, targets, steps=STEPS, **options):
    torch.manual_seed(0)
    config = veneer.AdaLoRA(
        initial_rank=4, target_rank=2, alpha=6, total_steps=steps, tinit=5, tfinal=FINAL, targets=targets, **options
    )  # fmt: skip
    veneer.attach(model, config)
    return veneer.allocator(model)


def _optimizer(model):
    # peft leaves ranknum, by which its scale is divided, trainable; in the paper the scale is constant.
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name]
    return torch.optim.AdamW(trained, lr=0.01)


def _inputs(name):
    """Without labels: peft's AdaLoRA fails on them where an adapter is only used."""
    return {"input_ids": tiny.batch(name)["input_ids"]}


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_pefts_choices_the_kept_triplets_are_pefts_at_every_step(name, interval):
    """In float64, so that a near tie is no tie of rounding."""
    targets = _TARGETS[name]
    model, theirs = tiny.build(name).double(), tiny.build(name).double()
    allocator = _ours(
        model, targets, delta_t=interval, orthogonality=0.5, orthogonality_form="mean-norm", sensitivity="after"
    )  # fmt: skip
    theirs = _theirs(theirs, targets, deltaT=interval, orth_reg_weight=0.5).double()
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_E")}
    assert list(layers) == list(allocator.triplets)
    with torch.no_grad():
        for path, update in allocator.triplets.items():
            update.lam.normal_(std=0.1)
            layers[path].lora_A["default"].copy_(update.Q)
            layers[path].lora_B["default"].copy_(update.P)
            layers[path].lora_E["default"].copy_(update.lam)
    mine, other = _optimizer(model), _optimizer(theirs)
    sums = set()
    for step in range(1, STEPS + 1):
        inputs = tiny.batch(name, seed=step)
        for one, optimizer in ((model, mine), (theirs, other)):
            optimizer.zero_grad()
            one(**inputs).loss.backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        pattern = theirs.base_model.peft_config["default"].rank_pattern
        sums.add(int(allocator.kept.sum()))
        for path, flags in zip(allocator.triplets, allocator.kept.tolist(), strict=True):
            theirs_now = pattern[f"{path}.lora_E.default"] if pattern else [True] * 4
            assert flags == theirs_now, (step, path)
    assert allocator.fixed
    assert len(sums) > 5


def _trained(name, steps, **options):
    model = tiny.build(name)
    allocator = _ours(model, _TARGETS[name], steps=20, **options)
    optimizer = _optimizer(model)
    for step in range(steps):
        optimizer.zero_grad()
        model(**tiny.batch(name, seed=step)).loss.backward()
        optimizer.step()
    return model.eval(), allocator


@pytest.mark.parametrize("steps", [8, 20], ids=["ranks still taken", "ranks fixed"])
@pytest.mark.parametrize("name", _TARGETS)
def test_peft_loads_ours_and_we_load_it_again(name, steps, tmp_path):
    model, allocator = _trained(name, steps)
    assert allocator.fixed == (steps == 20)
    inputs = _inputs(name)
    veneer.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny.build(name), tmp_path / "a").eval()
    torch.testing.assert_close(tiny.logits(theirs, inputs), tiny.logits(model, inputs), rtol=0, atol=2e-6)
    again = tiny.build(name)
    veneer.load_adapter(again, tmp_path / "a")
    assert torch.equal(tiny.logits(again, inputs), tiny.logits(model, inputs))
    assert veneer.allocator(again).ranks() == (
        allocator.ranks() if allocator.fixed else dict.fromkeys(allocator.ranks(), 4)
    )


def test_a_matrix_of_rank_0_crosses_both_ways(tmp_path):
    model, allocator = _trained("llama", 3)
    kept = torch.ones(len(allocator.triplets), 4, dtype=torch.bool)
    kept[0], kept[1, 2:] = False, False
    allocator.fix(kept)
    inputs = _inputs("llama")
    assert list(allocator.ranks().values())[:3] == [0, 2, 4]
    veneer.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "a").eval()
    torch.testing.assert_close(tiny.logits(theirs, inputs), tiny.logits(model, inputs), rtol=0, atol=2e-6)
    theirs.save_pretrained(tmp_path / "b")
    again = tiny.build("llama")
    veneer.load_adapter(again, tmp_path / "b")
    assert veneer.allocator(again).ranks() == allocator.ranks()
    torch.testing.assert_close(tiny.logits(again, inputs), tiny.logits(model, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name", _TARGETS)
def test_we_load_pefts(name, steps, tmp_path):
    theirs = _theirs(tiny.build(name), _TARGETS[name], steps=20)
    optimizer = _optimizer(theirs)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        theirs(**tiny.batch(name, seed=step)).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    inputs = _inputs(name)
    theirs.eval().save_pretrained(tmp_path / "a")
    model = tiny.build(name)
    veneer.load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(theirs, inputs), rtol=0, atol=2e-6)


def test_the_folder_has_pefts_keys(tmp_path):
    model, allocator = _trained("llama", 20)
    veneer.save(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    path = next(path for path, rank in allocator.ranks().items() if rank)
    rank = allocator.ranks()[path]
    shapes = {key.rsplit(".", 1)[-1]: tuple(t.shape) for key, t in tensors.items() if f"{path}.lora" in key}
    P, Q = allocator.triplets[path].P, allocator.triplets[path].Q
    assert shapes == {"lora_A": (rank, Q.shape[1]), "lora_B": (P.shape[0], rank), "lora_E": (rank, 1)}
    fields = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert fields["rank_pattern"][f"{path}.lora_E"] == allocator.triplets[path].kept.tolist()
    assert (fields["total_step"], fields["tinit"], fields["tfinal"], fields["init_r"]) == (20, 5, FINAL, 4)


def test_a_copy_of_the_model_allocates_by_itself():
    model, allocator = _trained("llama", 6)
    other = copy.deepcopy(model)
    assert veneer.allocator(other) is not allocator
    optimizer = _optimizer(other)
    other(**tiny.batch("llama")).loss.backward()
    optimizer.step()
    assert (allocator.step, veneer.allocator(other).step) == (6, 7)
