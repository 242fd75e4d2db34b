"""Checkpoints that were changed, cut or exchanged since they were written: refused in a sentence, nothing taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import veneer
from veneer.errors import TrainingError
from veneer.training.checkpoint import load_checkpoint, save_checkpoint
from veneer.training.paged_adamw import PagedAdamW
from veneer.training.seal import seal
from veneer.training.state import STATE_NAME, State

pytestmark = pytest.mark.unit
LORA = veneer.LoRA(rank=2, targets=["q_proj", "v_proj"])
ADALORA = veneer.AdaLoRA(target_rank=1, initial_rank=2, targets=["q_proj", "v_proj"], total_steps=20)


def _optimizer(kind, model, folder):
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        return torch.optim.AdamW(trained, 1e-3, fused=True)
    return PagedAdamW(trained, 1e-3, folder=folder, bits=8 if kind == "paged-8" else 32)


def _made(tmp_path, kind="adamw", update=LORA, steps=2):
    model = veneer.attach(tiny.build("llama"), update)
    optimizer = _optimizer(kind, model, tmp_path)
    for _ in range(steps):
        loss = model(torch.arange(1, 9).view(1, 8)).logits.square().mean()
        loss.backward()
        optimizer.step()
    if isinstance(update, veneer.AdaLoRA):
        veneer.allocator(model).prepare()
    save_checkpoint(tmp_path / "checkpoints", model, optimizer, State(step=steps, tokens=16), 3)
    return model, optimizer, tmp_path / "checkpoints" / f"step-{steps:06d}"


def _sealed(folder, **fields):
    """As if it had been written that way."""
    old = json.loads((folder / STATE_NAME).read_text())
    del old["digest"]
    new = {**old, **fields}
    new["digest"] = seal(folder, new, STATE_NAME)
    (folder / STATE_NAME).write_text(json.dumps(new))


def _with_tensors(folder, change):
    tensors = load_file(folder / "optimizer.safetensors")
    save_file(change(dict(tensors)), folder / "optimizer.safetensors")
    _sealed(folder)


def _key(tensors, ending):
    return next(name for name in sorted(tensors) if name.endswith(ending))


@pytest.mark.parametrize("kind", ["adamw", "paged", "paged-8"])
def test_what_was_written_is_read_back(tmp_path, kind):
    model, optimizer, folder = _made(tmp_path, kind)
    assert load_checkpoint(folder, model, optimizer) == State(step=2, tokens=16)


@pytest.mark.parametrize(
    "file", ["optimizer.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", STATE_NAME]
)
def test_a_changed_byte_is_noticed(tmp_path, file):
    model, optimizer, folder = _made(tmp_path)
    if file == STATE_NAME:
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"tokens": 16', '"tokens": 17'))
    else:
        data = bytearray((folder / file).read_bytes())
        data[-2] ^= 1
        (folder / file).write_bytes(data)
    with pytest.raises(TrainingError, match=r"step-000002 is damaged \(its files are not those .* the one before"):
        load_checkpoint(folder, model, optimizer)


def test_a_file_more_or_less_is_noticed(tmp_path):
    model, optimizer, folder = _made(tmp_path)
    (folder / "adapter" / "more").write_text("")
    with pytest.raises(TrainingError, match="is damaged"):
        load_checkpoint(folder, model, optimizer)


def _one_element(tensors):
    return {**tensors, (name := _key(tensors, ":exp_avg")): tensors[name].new_zeros(1)}


def _transposed(tensors):
    return {**tensors, (name := _key(tensors, ":exp_avg")): tensors[name].T.contiguous()}


def _doubled(tensors):
    return {**tensors, (name := _key(tensors, ":exp_avg_sq")): tensors[name].double()}


def _one_less(tensors):
    del tensors[_key(tensors, ":exp_avg")]
    return tensors


def _one_more(tensors):
    return {**tensors, _key(tensors, ":exp_avg").replace("exp_avg", "max_exp_avg_sq"): torch.zeros(2)}


def _nothing(tensors):
    return {name: value for name, value in tensors.items() if name.startswith("random.")}


def _of_another(tensors):
    return {name.replace("q_proj", "k_proj"): value for name, value in tensors.items()}


def _later(tensors):
    return {**tensors, _key(tensors, ":step"): torch.tensor(5.0)}


def _never(tensors):
    return {**tensors, _key(tensors, ":step"): torch.tensor(0.0)}


def _vector(tensors):
    return {**tensors, _key(tensors, ":step"): torch.tensor([1.0, 1.0])}


@pytest.mark.parametrize(
    "change",
    [_one_element, _transposed, _doubled, _one_less, _one_more, _nothing, _of_another, _later, _never, _vector],
)
def test_what_does_not_fit_is_refused_though_it_is_sealed(tmp_path, change):
    model, optimizer, folder = _made(tmp_path)
    _with_tensors(folder, change)
    with pytest.raises(TrainingError, match=r"step-000002 is damaged \(.*\); delete it to go on"):
        load_checkpoint(folder, model, optimizer)


def test_a_paged_moment_has_its_shape(tmp_path):
    model, optimizer, folder = _made(tmp_path, "paged")
    _with_tensors(folder, _one_element)
    with pytest.raises(TrainingError, match=r"step-000002 is damaged \(.*exp_avg is F32 .*delete it to go on"):
        load_checkpoint(folder, model, optimizer)


@pytest.mark.parametrize("kind", ["paged", "paged-8"])
@pytest.mark.parametrize("change", [_later, _vector, _nothing])
def test_the_paged_optimizer_is_no_exception(tmp_path, kind, change):
    model, optimizer, folder = _made(tmp_path, kind)
    _with_tensors(folder, change)
    with pytest.raises(TrainingError, match="is damaged"):
        load_checkpoint(folder, model, optimizer)


@pytest.mark.parametrize(
    "fields",
    [
        {"step": 10**9}, {"step": 1}, {"step": -5}, {"step": 2.5}, {"step": None}, {"step": "2"}, {"step": True},
        {"tokens": "many"}, {"seconds": "long"}, {"best_loss": "low"}, {"worse": -1}, {"more": 1},
        {"random.python": [3, [2**80] * 625, None]}, {"random.python": None}, {"random.python": [3]},
    ],
)  # fmt: skip
def test_a_state_of_other_types_or_another_step_is_refused(tmp_path, fields):
    model, optimizer, folder = _made(tmp_path)
    _sealed(folder, **fields)
    with pytest.raises(TrainingError, match="is damaged"):
        load_checkpoint(folder, model, optimizer)


@pytest.mark.parametrize("text", ["1", '"text"', "[]", "{", "", "{}"])
def test_a_state_that_is_no_mapping_is_refused(tmp_path, text):
    model, optimizer, folder = _made(tmp_path)
    (folder / STATE_NAME).write_text(text)
    with pytest.raises(TrainingError, match="is damaged"):
        load_checkpoint(folder, model, optimizer)


@pytest.mark.parametrize("name", ["allocator.kept", "allocator.sensitivity.0", "allocator.progress"])
def test_what_adalora_counts_has_its_shape(tmp_path, name):
    model, optimizer, folder = _made(tmp_path, update=ADALORA)
    load_checkpoint(folder, model, optimizer)
    _with_tensors(folder, lambda tensors: {**tensors, name: tensors[name].reshape(-1)[:1].clone()})
    with pytest.raises(TrainingError, match="is damaged"):
        load_checkpoint(folder, model, optimizer)


@pytest.mark.parametrize("name", ["random.torch", "random.numpy", "random.numpy.position"])
def test_random_states_that_none_could_be_are_refused(tmp_path, name):
    model, optimizer, folder = _made(tmp_path)
    _with_tensors(folder, lambda tensors: {**tensors, name: tensors[name][:1].clone()})
    with pytest.raises(TrainingError, match="is damaged"):
        load_checkpoint(folder, model, optimizer)


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_none_of_it(tmp_path):
    """os.replace is atomic, so a kill at any file leaves what `remove_leftovers` finds."""
    folder = tmp_path / "step-000001"
    folder.mkdir()
    for name in "abcdef":
        (folder / name).write_text(name)
    script = (
        "import os, shutil, pathlib; from veneer import files\n"
        "unlink = os.unlink; count = [0]\n"
        "def killed(*a, **k):\n"
        "    count[0] += 1\n"
        "    os._exit(9) if count[0] == 3 else unlink(*a, **k)\n"
        "os.unlink = killed\n"
        f"files.remove_folder(pathlib.Path({str(folder)!r}))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], env=os.environ, check=False).returncode == 9
    assert not folder.exists()
    from veneer.files import remove_leftovers

    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
