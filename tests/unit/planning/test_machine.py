"""The machine is measured once, within its time, and what is measured beside other work is not kept."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from veneer.commands import plan as verb
from veneer.errors import ConfigError
from veneer.planning import machine as machines
from veneer.planning.config import PlanOptions
from veneer.planning.ledger import KINDS
from veneer.planning.machine import Machine
from veneer.runs import measure

pytestmark = pytest.mark.unit

MACHINE = Machine(dict.fromkeys(KINDS, 1e10), operation=1e-6, runtime=4 * 10**8, loading=3 * 10**8)
BEFORE = "Measuring this machine once, about a minute."
AGAIN = "Measuring this machine again, about a minute."
ASKED = ("--batch-size", "2", "--max-length", "16")


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """A function that says what is measured, and whether beside other work; its cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(machine=MACHINE, busy=False):
        calls = []
        monkeypatch.setattr(machines, "_measure", lambda: calls.append(1) or machine)
        monkeypatch.setattr(machines.HostLoad, "disturbs", lambda _, cores: busy and cores == torch.get_num_threads())
        return calls

    return make


def test_the_first_plan_says_that_it_measures_and_json_stays_clean(measuring, tiny_folder, veneer_command):
    calls = measuring()
    first = veneer_command("plan", tiny_folder, *ASKED, "--json")
    assert (first.code, first.err) == (0, f"{BEFORE}\n")
    assert json.loads(first.out)["step_seconds"] > 0
    second = veneer_command("plan", tiny_folder, *ASKED, "--json")
    assert second.err == ""
    assert json.loads(second.out)["step_seconds"] == json.loads(first.out)["step_seconds"]
    assert len(calls) == 1


def test_it_is_measured_again_when_that_is_asked(measuring, tiny_folder, veneer_command):
    measuring()
    veneer_command("plan", tiny_folder, *ASKED)
    calls = measuring(Machine(dict.fromkeys(KINDS, 2e10), 1e-6, 4 * 10**8, 3 * 10**8))
    assert veneer_command("plan", tiny_folder, *ASKED, "--measure").err == f"{AGAIN}\n"
    assert len(calls) == 1
    assert machines.remembered().rates["passes"] == 2e10
    verb.plan(tiny_folder, batch_size=2, max_length=16, measure=True)
    assert len(calls) == 2


def test_rates_of_a_busy_machine_serve_one_plan_and_are_not_kept(measuring, tiny_folder, veneer_command):
    calls = measuring(busy=True)
    for _ in range(2):
        done = veneer_command("plan", tiny_folder, *ASKED, "--json")
        assert json.loads(done.out)["step_seconds"] > 0
        assert done.err.splitlines() == [
            BEFORE,
            "This machine was busy with other work while it was measured: the rates are used for this plan and not "
            "kept, so the next plan measures it again.",
        ]
    assert len(calls) == 2
    assert machines.remembered() is None


def test_rates_of_an_idle_machine_outlive_a_busy_one(measuring):
    measuring()
    assert machines.measured() == MACHINE
    measuring(Machine(dict.fromkeys(KINDS, 1e9), 1e-6, 1, 1), busy=True)
    assert machines.measured(afresh=True).rates["passes"] == 1e9
    assert machines.remembered() == MACHINE


def test_without_rates_after_a_minute_no_time_is_predicted(measuring, tiny_folder, veneer_command):
    measuring(Machine({}, 0.0, 4 * 10**8, 3 * 10**8))
    done = veneer_command("plan", tiny_folder, *ASKED)
    said = "This machine was too busy to measure its rates within a minute: this plan predicts no time."
    assert done.err.splitlines() == [BEFORE, said]
    assert "It fits" in done.out
    assert "tokens/s" not in done.out
    assert machines.remembered() is None


_HANGS = (
    "import subprocess, sys, time; print({line!r}, flush=True);"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
)


@pytest.mark.parametrize("line", ['{"rates": {}, "operation": 0.0, "runtime": 7, "loading": 5}', ""])
def test_a_measurement_that_takes_too_long_is_ended_with_all_that_it_started(line, monkeypatch):
    really = machines._within
    code = _HANGS.format(line=line) if line else "import time; time.sleep(600)"
    monkeypatch.setattr(machines, "_within", lambda seconds, _: really(seconds, [sys.executable, "-c", code]))
    started = time.monotonic()
    made = machines._measure(seconds=3.0)
    assert time.monotonic() - started < 120, "it did not wait for it"
    assert made.rates == {}
    if line:
        assert (made.runtime, made.loading) == (7, 5)
    else:
        assert made.runtime == made.loading > 10**7


def test_the_program_takes_fewer_steps_where_time_is_short(monkeypatch):
    assert list(measure._while_there_is_time(float("inf"))) == list(range(measure._STEPS))
    assert list(measure._while_there_is_time(0.0)) == list(range(measure._FEWEST))
    record = type("Record", (), {"step": measure._SURE})()
    measure._UntilTimeIsUp(float("inf")).on_step(record)
    with pytest.raises(measure._Enough):
        measure._UntilTimeIsUp(0.0).on_step(record)
    record.step -= 1
    measure._UntilTimeIsUp(0.0).on_step(record)


def test_the_longest_rows_are_among_the_steps_that_are_always_taken():
    from veneer.data.labels import Tokens
    from veneer.training.batches import Batches

    rows = [Tokens([1] * length, [1] * length, "") for length in measure._lengths()]
    batches = Batches(rows, measure._ROWS, 0)
    full = measure._ROWS * measure._TOKENS
    assert full in [sum(len(row.ids) for row in batches.rows(step)) for step in range(measure._SURE)]


def test_time_is_within_the_limit_that_ends_it():
    assert measure._OF_THE_RUN < measure._SECONDS < machines._SECONDS < 60


def test_a_gpus_plan_has_no_rates_to_measure():
    said = "measure takes the CPU's rates, and a plan for cuda is of memory only: leave one out."
    with pytest.raises(ConfigError, match=said):
        PlanOptions(model="m", device="cuda", measure=True)
