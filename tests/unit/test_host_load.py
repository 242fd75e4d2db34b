"""Others' work on this process's cores is what they were busy for and this process was not."""

from __future__ import annotations

import os

import pytest

from veneer import host_load
from veneer.host_load import HostLoad

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("cores", "others", "own", "needed", "disturbed"),
    [
        (2, 0.0, 20.0, 2, False),
        (2, 1.0, 19.0, 2, False),  # what a system does besides
        (2, 4.0, 16.0, 2, True),
        (2, 9.0, 10.0, 1, False),  # they have a core of their own
        (2, 12.0, 8.0, 1, True),
        (64, 400.0, 20.0, 2, False),
        (1, 5.0, 5.0, 4, True),
    ],
)
def test_a_machine_is_busy_where_others_leave_less_than_is_needed(cores, others, own, needed, disturbed, monkeypatch):
    clock, counts = iter([100.0, 110.0]), iter([(cores, 50.0, 3.0), (cores, 50.0 + others + own, 3.0 + own)])
    monkeypatch.setattr(host_load.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(host_load, "_counted", lambda: next(counts))
    assert HostLoad().disturbs(needed) is disturbed


def test_the_cores_of_this_process_are_counted(tmp_path, monkeypatch):
    ticks = os.sysconf("SC_CLK_TCK")
    lines = [f"cpu{number} {ticks} 0 {2 * ticks} 999 999 0 0 {ticks} 7 7" for number in range(3)]
    (tmp_path / "stat").write_text("\n".join([f"cpu  {9 * ticks} 0 0 0 0 0 0 0 0 0", *lines, "ctxt 5"]))
    monkeypatch.setattr(host_load, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    cores, busy, own = host_load._counted()
    assert (cores, busy) == (2, 8.0)
    assert own > 0


@pytest.mark.parametrize("text", ["", "cpu0 1 2\n", "cpu0 a b c d e f g h\n"])
def test_where_the_system_does_not_say_no_machine_is_busy(text, tmp_path, monkeypatch):
    (tmp_path / "stat").write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    for file in ("stat", "none"):
        monkeypatch.setattr(host_load, "_STAT", tmp_path / file)
        assert HostLoad().disturbs(1) is False
