"""The paged optimizer: the bits of torch's AdamW, whatever the sizes; its memory stays within the budget."""

from __future__ import annotations

import copy
import io
import mmap
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

import veneer
from veneer.errors import ConfigError, TrainingError
from veneer.frozen.codebook import dynamic8
from veneer.options import memory_size
from veneer.runs.folder import RunFolder
from veneer.runs.preflight import check_disk
from veneer.runs.train import resume
from veneer.training import eight_bit, pages
from veneer.training.config import TrainConfig
from veneer.training.eight_bit import state_bytes
from veneer.training.paged_adamw import MOMENTS, PagedAdamW

pytestmark = pytest.mark.unit

PAGE = 64 * 2**10  # bytes: 8192 elements of fp32 with their two moments
BUDGET = 12 * PAGE


def _parameters(shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def _set_gradients(parameters, step, skip=()):
    generator = torch.Generator().manual_seed(1000 + step)
    for number, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None if (step, number) in skip else gradient


def _equal(ours, wanted, optimizer, reference):
    for mine, its in zip(ours, wanted, strict=True):
        assert torch.equal(mine, its)
        state = reference.state.get(its, {})
        assert (mine in optimizer.state) == bool(state)
        if state:
            assert torch.equal(optimizer.state[mine]["step"], state["step"])
            for name in MOMENTS:
                assert torch.equal(optimizer.moment(mine, name), state[name])


@pytest.mark.parametrize("fused", [True, False])
@settings(max_examples=25)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 63, 64, 65, 4000, 8191, 8192, 8193, 30_000, 150_001]), min_size=1,
                   max_size=8),
    skip=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=12),
)  # fmt: skip
def test_every_step_is_torchs_to_the_last_bit(fused, tmp_path_factory, sizes, skip):
    """Of any size against the page's, with gradients that are sometimes missing."""
    ours, wanted = _parameters(sizes), _parameters(sizes)
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "fused": fused}
    optimizer = PagedAdamW(ours, **options, folder=tmp_path_factory.getbasetemp(), resident=BUDGET)
    reference = torch.optim.AdamW(wanted, **options)
    for step in range(4):
        for parameters, each in ((ours, optimizer), (wanted, reference)):
            _set_gradients(parameters, step, skip)
            each.step()
    _equal(ours, wanted, optimizer, reference)


def test_groups_have_their_own_options(tmp_path):
    shapes = [(100, 200), (3,), (50, 50), (7, 9)]
    ours, wanted = _parameters(shapes), _parameters(shapes)

    def groups(p):
        return [{"params": p[:2], "lr": 1e-1, "weight_decay": 0.0}, {"params": p[2:], "betas": (0.5, 0.6), "eps": 1e-3}]

    optimizer = PagedAdamW(groups(ours), folder=tmp_path, resident=BUDGET)
    reference = torch.optim.AdamW(groups(wanted), fused=True)
    for step in range(5):
        for parameters, each in ((ours, optimizer), (wanted, reference)):
            each.param_groups[0]["lr"] = 0.1 / (step + 1)  # as a schedule does
            _set_gradients(parameters, step)
            each.step()
    _equal(ours, wanted, optimizer, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_transposed_parameters_and_other_types(tmp_path, dtype):
    def made():
        plain = _parameters([(301, 203), (40, 3, 5, 5), (11,)], dtype=dtype)
        turned = torch.nn.Parameter(plain[0].detach().t())
        last = torch.nn.Parameter(plain[1].detach().to(memory_format=torch.channels_last))
        return [turned, last, plain[2]]

    ours, wanted = made(), made()
    optimizer = PagedAdamW(ours, folder=tmp_path, resident=BUDGET)
    reference = torch.optim.AdamW(wanted, fused=True)
    for step in range(3):
        for parameters, each in ((ours, optimizer), (wanted, reference)):
            _set_gradients(parameters, step)
            for parameter in parameters:  # as autograd lays them out
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            if each is optimizer:
                parameters[0].grad = parameters[0].grad.contiguous()  # another layout is another way to the same
            each.step()
    _equal(ours, wanted, optimizer, reference)
    whole = torch.cat(list(optimizer.parts(ours[0], "exp_avg")))
    assert torch.equal(whole.view(ours[0].shape), reference.state[wanted[0]]["exp_avg"])


def test_a_closure_is_called_with_gradients_on(tmp_path):
    (parameter,) = _parameters([(4,)])
    optimizer = PagedAdamW([parameter], folder=tmp_path)

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    before = (parameter**2).sum().item()
    assert optimizer.step(closure).item() == before
    assert (parameter**2).sum().item() < before


def test_the_state_goes_to_torchs_adamw_and_back(tmp_path):
    shapes = [(200, 100), (5,), (8,)]
    ours, wanted, again = _parameters(shapes), _parameters(shapes), _parameters(shapes)
    optimizer = PagedAdamW(ours, folder=tmp_path, resident=BUDGET)
    reference = torch.optim.AdamW(wanted, fused=True)
    back = PagedAdamW(again, folder=tmp_path, resident=BUDGET)
    _set_gradients(again, 99)
    back.step()  # what it holds is replaced, the last parameter's by nothing
    never = {(step, 2) for step in range(6)}

    _set_gradients(ours, 0, never)
    optimizer.step()
    for parameters, each, before, other in ((wanted, reference, optimizer, ours), (again, back, reference, wanted)):
        each.load_state_dict(copy.deepcopy(before.state_dict()))
        for mine, its in zip(parameters, other, strict=True):
            mine.data.copy_(its.data)
    for step in (1, 2):
        for parameters, each in ((ours, optimizer), (wanted, reference), (again, back)):
            _set_gradients(parameters, step, never if step == 1 else ())
            each.step()
    _equal(ours, wanted, optimizer, reference)
    _equal(again, wanted, back, reference)


@pytest.mark.parametrize("signed", [True, False])
@given(values=st.lists(st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False), min_size=1, max_size=600))
def test_a_moment_gets_the_nearest_code_of_its_map(signed, values):
    """Of each of a block's 256, by the distances to all values of the map, in fp64."""
    moment = torch.tensor(values if signed else [abs(value) for value in values])
    codes, scales = torch.empty(len(values), dtype=torch.uint8), torch.empty(-(-len(values) // 256))
    eight_bit.code(moment, codes, scales, signed=signed)
    found = eight_bit.decode(codes, scales, signed=signed)
    table = dynamic8(signed).double()
    for start in range(0, len(values), 256):
        block, scale = moment[start : start + 256].double(), scales[start // 256].double()
        assert scale == block.abs().max()
        best = (block[:, None] - table * scale).abs().min(dim=1).values
        distance = (block - found[start : start + 256].double()).abs()
        never_zero = scale * table[1] if not signed else 0.0
        assert bool((distance <= torch.maximum(best, torch.as_tensor(never_zero)) + 1e-6 * scale).all())
    assert torch.equal(found == 0, moment == 0) or signed
    assert not found[moment == 0].any()


def _distance(ours, wanted):
    """Distance of the parameters, as a share of how far they have come."""
    start = _parameters([p.shape for p in ours])
    moved = sum(float((w - s).detach().square().sum()) for w, s in zip(wanted, start, strict=True))
    return (sum(float((o - w).detach().square().sum()) for o, w in zip(ours, wanted, strict=True)) / moved) ** 0.5


def _descend(parameters, optimizer, steps):
    """Towards zero, by gradients with noise: a small problem with a right answer."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = parameter.detach() + 0.1 * noise
        optimizer.step()


def test_states_in_8_bits_are_small_and_their_steps_near(tmp_path):
    shapes = [(200, 300), (5,), (1000, 7), (0,)]
    ours, wanted = _parameters(shapes), _parameters(shapes)
    optimizer = PagedAdamW(ours, 1e-2, folder=tmp_path, bits=8)
    reference = torch.optim.AdamW(wanted, 1e-2)
    for each, parameters in ((optimizer, ours), (reference, wanted)):
        _descend(parameters, each, 60)
    assert _distance(ours, wanted) < 0.03
    state = optimizer.state_dict()["state"]
    kept = sum(tensor.nbytes for each in state.values() for name, tensor in each.items() if name != "step")
    elements = sum(parameter.numel() for parameter in ours)
    assert kept == 2 * elements + 2 * 4 * sum(-(-p.numel() // 256) for p in ours)  # 2.03 bytes for each, not 8


def test_states_in_8_bits_are_as_near_as_bitsandbytes(tmp_path):
    """Its own blockwise optimizer is for GPUs; here its maps, and coding by exact distances, around AdamW's formula."""
    (ours,), (wanted,) = _parameters([(64, 64)]), _parameters([(64, 64)])
    optimizer = PagedAdamW([ours], 1e-2, weight_decay=0.1, folder=tmp_path, bits=8)
    m, v = torch.zeros(64 * 64), torch.zeros(64 * 64)
    maps = [create_dynamic_map(signed) for signed in (True, False)]
    for step in range(1, 5):
        for parameter in (ours, wanted):
            _set_gradients([parameter], step)
        optimizer.step()
        g = wanted.grad.flatten()
        m, v = m.lerp(g, 0.1), v * 0.999 + g * g * 0.001
        with torch.no_grad():
            wanted.mul_(1 - 1e-3)
            size = (v / (1 - 0.999**step)).sqrt() + 1e-8
            wanted -= (1e-2 * m / (1 - 0.9**step) / size).view(64, 64)
        m, v = (_nearest(moment, table) for moment, table in zip((m, v), maps, strict=True))
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def _nearest(moment, table):
    blocks = moment.view(-1, 256)
    scale = blocks.abs().amax(1, keepdim=True)
    places = (blocks[:, :, None] / scale[:, :, None] - table).abs().argmin(-1)
    places = torch.where((blocks > 0) & (table[0] == 0), places.clamp(min=1), places)
    return (table[places] * scale).flatten()


def test_a_second_moment_that_is_not_zero_stays_so(tmp_path):
    """Once a large gradient, once none: what is kept of the smaller ones must still divide."""
    (parameter,) = _parameters([(256,)])
    optimizer = PagedAdamW([parameter], 1e-2, weight_decay=0.0, folder=tmp_path, bits=8)
    before = parameter.detach().clone()
    for step in range(3):
        parameter.grad = torch.full((256,), 1e-3 if step == 0 else 0.0)
        parameter.grad[0] = 10.0 if step == 0 else 0.0
        optimizer.step()
    assert float((parameter - before).abs().max()) < 0.1


@settings(max_examples=15)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 255, 256, 257, 4000, 30_000, 70_001]), min_size=1, max_size=6),
    skip=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=8), first=st.sampled_from([0, 1, 2]),
)  # fmt: skip
def test_states_in_8_bits_do_not_depend_on_the_pages_and_go_on_from_a_state(tmp_path_factory, sizes, skip, first):
    folder = tmp_path_factory.getbasetemp()
    a, b = _parameters(sizes), _parameters(sizes)
    small = PagedAdamW(a, folder=folder, resident=BUDGET, bits=8)
    large = PagedAdamW(b, folder=folder, resident="64MB", bits=8)
    for step in range(4):
        if step == first:
            again = PagedAdamW(b, folder=folder, resident="16MB", bits=8)
            again.load_state_dict(copy.deepcopy(large.state_dict()))
            large = again
        for parameters, each in ((a, small), (b, large)):
            _set_gradients(parameters, step, skip)
            each.step()
    for mine, its in zip(a, b, strict=True):
        assert torch.equal(mine, its)
        assert all(torch.equal(small.moment(mine, name), large.moment(its, name)) for name in MOMENTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_states_in_8_bits_of_other_types_and_transposed_ones(tmp_path, dtype):
    (plain,) = _parameters([(301, 203)], dtype=dtype)
    ours, wanted = torch.nn.Parameter(plain.detach().t().clone(memory_format=torch.preserve_format)), plain
    optimizer = PagedAdamW([ours], folder=tmp_path, bits=8)
    reference = PagedAdamW([wanted], folder=tmp_path, bits=8)
    for step in range(3):
        _set_gradients([wanted], step)
        ours.grad = wanted.grad.t()
        optimizer.step()
        reference.step()
    assert torch.equal(ours, wanted.t())
    assert torch.equal(optimizer.moment(ours, "exp_avg"), reference.moment(wanted, "exp_avg").t())


def test_a_state_of_other_bits_is_refused(tmp_path):
    (parameter,) = _parameters([(300,)])
    states = {}
    for bits in (32, 8):
        optimizer = PagedAdamW([parameter], folder=tmp_path, bits=bits)
        _set_gradients([parameter], 0)
        optimizer.step()
        states[bits] = optimizer.state_dict()
    for mine, its in ((32, 8), (8, 32)):
        optimizer = PagedAdamW([parameter], folder=tmp_path, bits=mine)
        with pytest.raises(ConfigError, match=rf"^This state was not kept in {mine} bits, which PagedAdamW was made"):
            optimizer.load_state_dict(states[its])


def test_the_maps_are_bitsandbytes():
    for signed in (True, False):
        assert torch.equal(dynamic8(signed), create_dynamic_map(signed))


def test_a_run_with_states_in_8_bits_resumes_to_the_same_bytes(tiny_folder, rows_file, tmp_path):
    """And learns as one with 32: the held-out loss is near."""
    paged = {"optimizer": "paged-adamw", "optimizer_memory": "1MB"}
    wanted = _train(tiny_folder, rows_file, tmp_path / "run", **paged, optimizer_bits=8)
    assert wanted != _train(tiny_folder, rows_file, tmp_path / "whole", **paged)
    folder = tmp_path / "run"
    losses = [RunFolder(tmp_path / name).metrics()[-1]["held_out_loss"] for name in ("run", "whole")]
    assert abs(losses[0] - losses[1]) < 0.02
    file = load_file(folder / "checkpoints/step-000006/optimizer.safetensors")
    assert {name.rpartition(":")[2] for name in file if ":" in name} == {
        "step", "exp_avg.codes", "exp_avg.scales", "exp_avg_sq.codes", "exp_avg_sq.scales"
    }  # fmt: skip
    for later in ("adapter", "best", "checkpoints/step-000006"):
        shutil.rmtree(folder / later)
    resume(folder, console=Console(file=io.StringIO()))
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == wanted
    with pytest.raises(ConfigError, match="optimizer_bits"):
        resume(folder, console=Console(file=io.StringIO()), optimizer_bits=32)


def _resident(folder: Path) -> int:
    """Bytes of the scratch file that are in this process's memory, by the system's own count."""
    text = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(folder))}/\S+ \(deleted\)\n(?:\S+:? .*\n)*?Rss: +(\d+) kB", text)
    assert len(found) == 1
    return int(found[0]) * 1024


@pytest.mark.parametrize("many", [False, True])
def test_no_more_than_the_budget_is_in_memory(tmp_path, monkeypatch, many):
    """Of one large parameter and of a thousand small ones alike."""
    shapes = [(16, 64)] * 1000 if many else [(1024, 1000)]
    parameters = _parameters(shapes)
    optimizer = PagedAdamW(parameters, folder=tmp_path, resident=BUDGET)
    seen, update = [], optimizer._update

    def counted(*arguments):
        update(*arguments)
        seen.append(_resident(tmp_path))

    monkeypatch.setattr(optimizer, "_update", counted)
    for step in range(2):
        _set_gradients(parameters, step)
        optimizer.step()
    assert len(seen) == 2 * 125  # 8 MB of states in pages of 64 KiB: the small ones are packed
    assert 9 * PAGE <= max(seen) <= BUDGET
    assert _resident(tmp_path) <= BUDGET
    optimizer.state_dict()
    assert _resident(tmp_path) <= BUDGET


def test_states_that_fit_stay(tmp_path):
    parameters = _parameters([(8192,)] * 12)
    optimizer = PagedAdamW(parameters, folder=tmp_path, resident=BUDGET)
    _set_gradients(parameters, 0)
    optimizer.step()
    assert _resident(tmp_path) == BUDGET


def test_a_page_that_an_error_left_is_dropped_too(tmp_path, monkeypatch):
    parameters = _parameters([(1024, 1000)])
    optimizer = PagedAdamW(parameters, folder=tmp_path, resident=BUDGET)
    _set_gradients(parameters, 0)
    optimizer.step()
    before = _resident(tmp_path)
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert _resident(tmp_path) <= before


def test_the_scratch_file_has_no_name_and_goes_with_the_optimizer(tmp_path):
    optimizer = PagedAdamW(_parameters([(1024, 1000)]), folder=tmp_path, resident=BUDGET)
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del optimizer
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr = -1 is negative"),
        ({"weight_decay": float("nan")}, "weight_decay = nan is negative or no number"),
        ({"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\) are not both from 0 up to 1"),
        ({"bits": 16}, r"^bits = 16 is not 32 or 8\.$"),
        ({"resident": "a lot"}, "'a lot' is not a size in memory; write a number and KB, MB"),
        ({"page_size": 100_000}, "page_size = 100000 is not a power of two from 64 KiB up of which"),
        ({"page_size": 2**16, "resident": 2**16}, "cannot work within 0.1 MB; give it at least 1MB"),
    ],
)
def test_a_value_without_sense_is_refused(tmp_path, options, message):
    with pytest.raises((ConfigError, TrainingError), match=message):
        PagedAdamW(_parameters([(3,)]), folder=tmp_path, **options)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, device="meta"), r"shape \(3,\) is on meta, but PagedAdamW pages on the CPU only"),
        (torch.zeros(3, dtype=torch.complex64), r"is torch.complex64; PagedAdamW updates floating-point ones"),
        (torch.zeros(3, 4)[:, ::2], r"shape \(3, 2\) has gaps in memory \(strides \(4, 2\)\); make it contiguous"),
    ],
)
def test_a_parameter_that_cannot_page_is_refused(tmp_path, tensor, message):
    with pytest.raises(ConfigError, match=message):
        PagedAdamW([torch.nn.Parameter(tensor)], folder=tmp_path)


def test_what_torchs_adamw_has_and_this_has_not_is_refused(tmp_path):
    (parameter,) = _parameters([(4, 2)])
    optimizer = PagedAdamW([parameter], folder=tmp_path)
    with pytest.raises(ConfigError, match="give all parameter groups when it is made"):
        optimizer.add_param_group({"params": _parameters([(2,)])})
    with pytest.raises(ConfigError, match="PagedAdamW has no amsgrad"):
        optimizer.load_state_dict(torch.optim.AdamW(_parameters([(4, 2)]), amsgrad=True).state_dict())
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(4, 2).to_sparse()
    with pytest.raises(ConfigError, match="takes dense gradients; make the embedding with sparse=False"):
        optimizer.step()
    assert torch.equal(parameter, before)
    assert not optimizer.state.get(parameter)


def test_a_full_disk_and_another_system_are_noticed_before_the_first_step(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        PagedAdamW(_parameters([(4,)]), folder=tmp_path)
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    with pytest.raises(TrainingError, match=r"needs Linux .*; use optimizer: adamw"):
        pages.Pages(tmp_path, 1, PAGE, BUDGET)


@pytest.mark.parametrize(
    ("text", "size"), [(5, 5), ("7B", 7), ("256MB", 256_000_000), ("1.5 GiB", 3 * 2**29), ("2kib", 2048), ("3B", 3)]
)
def test_a_size_in_memory_is_read(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "12 XB", "1e9", -1, True])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="is not a size in memory"):
        memory_size(text)


_QUIET = {"steps": 6, "rank": 4, "batch_size": 8, "learning_rate": 1e-2, "held_out": 8, "checkpoint_every": 3}


def _train(tiny_folder, rows_file, output, **more):
    console = Console(file=io.StringIO())
    # The whole head and embedding, so that there is more than one page.
    also = {"train_also": ["lm_head", "embed_tokens"], "weight_decay": 0.1, "console": console}
    veneer.train(str(tiny_folder), data=str(rows_file), output=str(output), **{**_QUIET, **also, **more})
    return (output / "adapter/adapter_model.safetensors").read_bytes()


def test_a_run_is_the_same_bytes_with_either_optimizer(tiny_folder, rows_file, tmp_path):
    """And its checkpoint is one for the other: a run that was killed for its memory goes on with pages."""
    wanted = _train(tiny_folder, rows_file, tmp_path / "torch")
    paged = {"optimizer": "paged-adamw", "optimizer_memory": "1MB"}
    assert _train(tiny_folder, rows_file, tmp_path / "paged", **paged) == wanted
    files = [load_file(tmp_path / f"{run}/checkpoints/step-000006/optimizer.safetensors") for run in ("torch", "paged")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    for run, over in (("torch", paged), ("paged", {"optimizer": "adamw", "optimizer_memory": "256MB"})):
        folder = tmp_path / run
        for later in ("adapter", "best", "checkpoints/step-000006"):
            shutil.rmtree(folder / later)
        resume(folder, console=Console(file=io.StringIO()), **over)
        assert (folder / "adapter/adapter_model.safetensors").read_bytes() == wanted
    scratch = rf"{tmp_path}/\w+/[^/\s]+ \(deleted\)"
    assert not re.search(scratch, Path("/proc/self/maps").read_text()), "the scratch file is gone with the run"


def test_a_damaged_moment_names_the_checkpoint(tiny_folder, rows_file, tmp_path):
    _train(tiny_folder, rows_file, tmp_path / "run", optimizer="paged-adamw")
    file = tmp_path / "run/checkpoints/step-000006/optimizer.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("exp_avg"))
    save_file({**tensors, name: tensors[name][:1].clone()}, file)
    with pytest.raises(TrainingError, match=r"step-000006 is damaged \(its files are not those .*delete it to go on"):
        resume(tmp_path / "run", console=Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_memory": "1GB"}, "optimizer_memory limits the states of paged-adamw; give optimizer: paged-adamw"),
        ({"optimizer_bits": 8}, "adamw has its states in 32 bits; give optimizer: paged-adamw as well as"),
        ({"optimizer_memory": "lots", "optimizer": "paged-adamw"}, "optimizer_memory = 'lots' is not a size in memory"),
    ],
)
def test_a_budget_that_limits_nothing_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(model="m", data="d", output="o", **options)


def test_the_disk_must_have_room_for_the_pages(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 16 * 2**20 + 4 * 10**6 * 10))
    in_32_bits, in_8_bits = (state_bytes(10**6, bits) for bits in (32, 8))
    check_disk(tmp_path, 10**6, 1, in_32_bits)
    with pytest.raises(TrainingError, match=r"the run will write 64\.8 MB"):
        check_disk(tmp_path, 10**6, 1, in_32_bits, paged=True)
    check_disk(tmp_path, 10**6, 1, in_8_bits, paged=True)
