"""Threads are settled before torch loads, and what the user has set stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from veneer import threads

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_either_version_of_control_groups(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert threads._quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "bound", "wanted"), [(None, 4, 4), (1.5, 4, 2), (0.2, 4, 1), (8.0, 4, 4)])
def test_cores_are_those_bound_to_as_far_as_they_are_paid_for(monkeypatch, quota, bound, wanted):
    monkeypatch.setattr(threads, "_quota", {"a": None, "b": quota, "c": 100.0}.get)
    monkeypatch.setattr(threads, "control_groups", lambda _: ["a", "b", "c"])
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(bound)), raising=False)
    assert threads.cores() == wanted


def _after_settling(**settings):
    code = (
        "import os; from veneer.threads import settle; settle();"
        "print(os.environ['OMP_NUM_THREADS'], os.environ.get('GOMP_SPINCOUNT')); import torch;"
        "print(torch.get_num_threads())"
    )
    unset = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | settings
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.usefixtures("all_cores")
def test_what_the_user_has_not_set_is_set_before_torch_loads():
    here = str(threads.cores())
    assert _after_settling() == [here, threads._SPINS, here]
    assert _after_settling(OMP_NUM_THREADS="1") == ["1", threads._SPINS, "1"]
    assert _after_settling(GOMP_SPINCOUNT="7") == [here, "7", here]
    assert _after_settling(OMP_WAIT_POLICY="active") == [here, "None", here]


_PRODUCTS_OF_MANY_SIZES = """
import sys
from veneer.threads import settle
if sys.argv[1] == "settled":
    settle()
import torch
from veneer.kernels.dense import linear
from veneer.host_memory import resident_memory
weight = torch.zeros(576, 576)
for rows in range(200, 232):
    linear(torch.zeros(rows, 576), weight, None)
before = resident_memory()
for rows in range(232, 432):
    linear(torch.zeros(rows, 576), weight, None)
print(resident_memory() - before)
"""


def test_what_is_remembered_of_products_does_not_grow_with_their_sizes():
    """As of rows of another length in each step."""
    grown = {
        how: int(subprocess.run([sys.executable, "-c", _PRODUCTS_OF_MANY_SIZES, how], stdout=-1, check=True).stdout)
        for how in ("as it comes", "settled")
    }
    if grown["as it comes"] < 8e6:
        pytest.skip(f"what this processor remembers of 200 products takes {grown['as it comes'] / 1e6:.1f} MB")
    assert grown["settled"] < grown["as it comes"] / 4


def test_how_much_is_remembered_is_the_users_to_say(monkeypatch):
    monkeypatch.setattr(threads.sys, "modules", {})
    monkeypatch.setattr(threads.os, "environ", {"LRU_CACHE_CAPACITY": "7"})
    monkeypatch.setattr(threads, "_settled", False)
    threads.settle()
    assert threads.os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert threads.os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "32"


def test_once_torch_is_loaded_nothing_is_set(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    threads.settle()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("8", ["OMP_NUM_THREADS is set to 8: so many threads on 2 cores wait for each other."]),
        ("1", ["OMP_NUM_THREADS is set to 1: 1 of 2 cores work."]),
        ("2", []),
        ("", []),
    ],
)
def test_a_number_of_the_users_own_is_spoken_of(monkeypatch, value, wanted):
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert threads.said() == wanted
