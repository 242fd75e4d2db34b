"""Models in others' wrappers, with others' adapters, and in other processes: right, or refused in a sentence."""

from __future__ import annotations

import copy
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tiny
import veneer
from veneer.errors import TargetError

pytestmark = pytest.mark.unit


def _compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {"compile": _compiled, "DataParallel": nn.DataParallel, "both": lambda m: _compiled(nn.DataParallel(m))}


def _files(folder):
    return [(folder / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")]


def _randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("first", ["wrap", "attach"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_wrapped_model_has_the_adapters_of_the_model_inside(name, wrapper, first, tmp_path):
    config, inputs = veneer.LoRA(rank=4), tiny.batch(name)
    torch.manual_seed(0)
    plain = _randomized(veneer.attach(tiny.build(name), config))
    veneer.save(plain, tmp_path / "plain")
    torch.manual_seed(0)
    inner = tiny.build(name)
    if first == "attach":
        veneer.attach(inner, config)
    wrapped = WRAPPERS[wrapper](inner)
    if first == "wrap":
        assert veneer.attach(wrapped, config) is wrapped
    _randomized(wrapped)
    veneer.save(wrapped, tmp_path / "wrapped")
    assert _files(tmp_path / "wrapped") == _files(tmp_path / "plain")
    assert veneer.trainable(wrapped).parameters == veneer.trainable(plain).parameters
    logits = tiny.logits(plain, inputs)
    assert torch.equal(tiny.logits(inner, inputs), logits)
    with veneer.disabled(wrapped):
        assert torch.equal(tiny.logits(inner, inputs), tiny.logits(tiny.build(name), inputs))
    veneer.merge(wrapped)
    veneer.unmerge(wrapped)
    veneer.load_adapter(wrapped, tmp_path / "plain", name="again")
    veneer.activate(wrapped, "again")
    assert torch.equal(tiny.logits(inner, inputs), logits)
    for adapter in ("default", "again"):
        veneer.remove(wrapped, adapter)
    assert tiny.same_state(inner, tiny.state(tiny.build(name)))


@pytest.mark.parametrize("wrapper", [_compiled, checkpoint_wrapper])
@pytest.mark.parametrize("method", [veneer.LoRA(rank=4), veneer.AdaLoRA(target_rank=2, total_steps=4, tinit=0)])
def test_files_are_without_the_names_of_wrappers_inside(wrapper, method, tmp_path):
    model = veneer.attach(tiny.build("llama"), method)
    tiny.train_steps(model, tiny.batch("llama"), steps=4)
    veneer.save(model, tmp_path / "plain")
    logits = tiny.logits(model, tiny.batch("llama"))
    model.model.layers[1] = wrapper(model.model.layers[1])
    veneer.save(model, tmp_path / "wrapped")
    assert (
        load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "wrapped" / "adapter_model.safetensors").keys()
    )
    for base in (tiny.build("llama"), tiny.build("llama")):
        veneer.load_adapter(base, tmp_path / "wrapped")
        assert torch.equal(tiny.logits(base, tiny.batch("llama")), logits)
    other = tiny.build("llama")
    other.model.layers[1] = wrapper(other.model.layers[1])
    veneer.load_adapter(other, tmp_path / "plain")
    veneer.save(other, tmp_path / "again")
    assert _files(tmp_path / "again")[0] == _files(tmp_path / "plain")[0]


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch's default compiler needs a C++ compiler")
def test_training_with_the_default_compiler_gives_the_plain_gradients():
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    torch.manual_seed(0)
    _randomized(veneer.attach(model, veneer.LoRA(rank=4)))
    plain, x = copy.deepcopy(model), torch.randn(21, 32)
    for module in (torch.compile(model), plain):
        module(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_distributed_model_is_refused_before_and_served_after(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = tiny.build("llama")
        with pytest.raises(TargetError, match=r"the parameters that it was made with.*attach to the model first, then"):
            veneer.attach(nn.parallel.DistributedDataParallel(model), veneer.LoRA())
        assert tiny.same_state(model, tiny.state(tiny.build("llama")))
        veneer.attach(model, veneer.LoRA(rank=2))
        veneer.save(nn.parallel.DistributedDataParallel(model), tmp_path / "a")
        veneer.save(model, tmp_path / "b")
        assert _files(tmp_path / "a") == _files(tmp_path / "b")
    finally:
        dist.destroy_process_group()


def test_a_part_and_its_whole_cannot_both_have_adapters():
    model = tiny.build("llama")
    veneer.attach(model.model, veneer.LoRA(rank=2), "inner")
    _randomized(model)
    logits = tiny.logits(model, tiny.batch("llama"))
    with pytest.raises(
        TargetError, match=r"model, a part of this model, has adapters of its own \(inner\), which would"
    ):
        veneer.attach(model, veneer.LoRA(rank=2), "outer")
    assert torch.equal(tiny.logits(model, tiny.batch("llama")), logits)
    veneer.remove(model.model, "inner")
    veneer.attach(model, veneer.LoRA(rank=2), "outer")
    with pytest.raises(TargetError, match="a part of a model that has adapters already; attach to that whole model"):
        veneer.attach(model.model, veneer.LoRA(rank=2), "inner")


def test_a_spawned_worker_trains_and_saves(tmp_path):
    model = veneer.attach(tiny.build("llama"), veneer.AdaLoRA(target_rank=2, total_steps=8, tinit=1, tfinal=2))
    here = copy.deepcopy(model)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:
        worker.submit(tiny.train_steps, model, tiny.batch("llama")).result()  # in memory that is shared
        worker.submit(model.save_pretrained, tmp_path / "there").result()
    tiny.train_steps(here, tiny.batch("llama"))
    here.save_pretrained(tmp_path / "here")
    assert _files(tmp_path / "there") == _files(tmp_path / "here")


def test_a_model_in_flat_shards_is_refused():
    """By its name: FullyShardedDataParallel itself asks for a group of processes."""
    sharded = type("FullyShardedDataParallel", (nn.Module,), {})()
    sharded.inner = tiny.build("llama")
    with pytest.raises(TargetError, match="in the flat shards of FullyShardedDataParallel; attach to the model first"):
        veneer.attach(sharded, veneer.LoRA(targets=["q_proj"]))
