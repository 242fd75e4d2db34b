"""device.py alone names devices; a run asks its model's device and opens no other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
import veneer
from veneer import device
from veneer.errors import ConfigError
from veneer.frozen.compute import computing
from veneer.training.checkpoint import State, load_checkpoint, save_checkpoint
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit
PACKAGE = Path(device.__file__).parent
TYPES = {"cpu", "cuda", "mps", "xpu", "meta"}
# The controller "cpu" of a control group, /proc/stat's line "cpu", a generated file.
OTHERS = {"control_groups.py", "threads.py", "host_load.py", "arguments.py"}


def _named(tree):
    """The lines that name a device: its type in quotes, alone or with a number, or torch's module for it."""
    for node in ast.walk(tree):
        quoted = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.partition(":")[0]
        of_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
        if quoted in TYPES or (of_torch and node.attr in {*TYPES, "accelerator"}):
            yield node.lineno


def test_no_other_file_names_a_device():
    types = PACKAGE / "runs" / "arguments.py"  # written from the options, whose device is one of device.py's
    files = [file for file in PACKAGE.rglob("*.py") if file.name not in {"device.py", *OTHERS} and file != types]
    named = [
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in files
        for line in _named(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert named == []


def test_the_search_sees_each_way_to_name_one():
    code = 'x.to("cpu"); torch.cuda.is_available(); f"cuda:0"; y = {"a": "cuda:1"}; torch.mps; "a cpu"; x.cpu'
    assert len(list(_named(ast.parse(code)))) == 5


def test_it_loads_no_torch():
    code = "import sys, veneer.device, veneer.planning.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_cpu_has_the_process_memory():
    model = nn.Linear(2, 2)
    assert device.device_of(model) == torch.device("cpu")
    assert device.is_present("cpu")
    assert 10**7 < device.peak_memory("cpu") < 2**60
    assert 10**7 < device.usable_memory(torch.device("cpu")) < 2**60
    device.synchronise(torch.device("cpu"))


class _Gpu:
    """torch's module of a GPU, in which a test sees what was asked of it."""

    def __init__(self):
        self.state, self.asked = torch.arange(4, dtype=torch.uint8), []

    def __getattr__(self, name):
        answers = {
            "is_available": True, "mem_get_info": (700, 1000), "memory_reserved": 50, "max_memory_allocated": 40,
            "synchronize": None, "get_rng_state": self.state,
        }  # fmt: skip
        return lambda *arguments: (self.asked.append((name, *arguments)), answers.get(name))[1]


@pytest.fixture
def gpu(monkeypatch):
    module = _Gpu()
    monkeypatch.setattr(torch, "get_device_module", lambda of: {"cuda": module}[of])
    return module


def test_a_gpu_is_asked_for_its_own(gpu):
    first = torch.device("cuda", 0)
    assert device.is_present("cuda")
    assert device.usable_memory(first) == 750
    assert device.usable_memory("cuda") == 750
    assert device.peak_memory(first) == 40
    device.synchronise(first)
    states = device.random_states(first)
    assert set(states) == {"torch", "cuda"}
    device.set_random_states(states, first)
    assert [asked[0] for asked in gpu.asked[-3:]] == ["synchronize", "get_rng_state", "set_rng_state"]
    assert gpu.asked[-1][1:] == (gpu.state, first)


def test_work_on_the_cpu_opens_no_gpu(gpu):
    states = device.random_states("cpu")
    assert set(states) == {"torch"}
    before = torch.rand(3)
    device.set_random_states({**states, "cuda": gpu.state}, torch.device("cpu"))  # of a run that began on a GPU
    assert torch.equal(torch.rand(3), before)
    assert gpu.asked == []


def test_a_checkpoint_of_a_run_on_the_cpu_asks_no_gpu_of_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("the GPU was opened"))
    model = veneer.attach(tiny.build("llama"), veneer.LoRA(rank=2))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer, State(step=1), 1)
    drawn = torch.rand(3)
    assert load_checkpoint(tmp_path / "step-000001", model, optimizer).step == 1
    assert torch.equal(torch.rand(3), drawn)


def test_names_that_may_be_asked_for():
    for name in ("auto", "cpu", "cuda", "cuda:3", "mps", "xpu", "xpu:1"):
        assert device.known_name(name) == name
    for name, near in (("cuba", "'cuda'"), ("gpu", "'cuda'"), ("cuda:x", "'cuda:N'"), ("CPU:0", "")):
        with pytest.raises(ConfigError, match=f"device = '{name}' is not one of auto, cpu, .*{near}"):
            TrainConfig(model="m", data="d", output="o", device=name)


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(device, "is_present", lambda kind: kind == "cpu")
    assert device.available("auto") == device.available("cpu") == "cpu"
    assert device.gpus() == []
    for name in ("cuda", "cuda:1", "mps", "xpu"):
        with pytest.raises(ConfigError, match=f"There is no {name} here: PyTorch .* give device cpu"):
            device.available(name)
    with pytest.raises(ConfigError, match="There is no cuda here"):
        veneer.load("smollm2-135m-instruct", device="cuda")


def test_gpus_are_numbered(gpu, monkeypatch):
    monkeypatch.setattr(device, "is_present", lambda kind: kind == "cuda")
    monkeypatch.setattr(gpu, "device_count", lambda: 2, raising=False)
    monkeypatch.setattr(
        gpu, "get_device_capability", lambda of: {"cuda:0": (7, 5), "cuda:1": (8, 0)}[of], raising=False
    )
    assert device.gpus() == ["cuda:0", "cuda:1"]
    assert (device.available("cuda"), device.available("cuda:1")) == ("cuda:0", "cuda:1")
    with pytest.raises(ConfigError, match="There is no cuda:2 here: the devices are cuda:0, cuda:1, cpu"):
        device.available("cuda:2")
    assert computing("auto", "nf4", "cuda:0").name == "fp32"
    assert str(computing("auto", "nf4", "cuda:1")) == "bf16 (auto: cuda:1 has instructions for bf16)"
    assert computing("fp32", "nf4", "cuda:1").name == "fp32"
