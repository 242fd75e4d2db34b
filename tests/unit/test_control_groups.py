"""The control groups of a process are found where the system says, and what they may have bounds memory and threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer import control_groups as groups

pytestmark = pytest.mark.unit

ROOT = Path("/sys/fs/cgroup")
MEMORY = 2 * 10**9  # bytes
# controller → of version 1 and 2, the file of the limit and what is written there
LIMITS = {
    "memory": (("memory.limit_in_bytes", str(MEMORY)), ("memory.max", str(MEMORY))),
    "cpu": (("cpu.cfs_quota_us", "100000"), ("cpu.max", "100000 100000")),
}


@pytest.mark.parametrize(
    ("told", "folders"),
    [
        ("0::/user.slice/job.scope\n", ["user.slice/job.scope", "user.slice", ".", "memory"]),
        ("0::/\n", [".", "memory"]),
        ("5:cpu,cpuacct:/a\n4:memory:/slurm/job_7\n", ["memory/slurm/job_7", "memory/slurm", "memory", "."]),
        ("4:memory:/job\n1:name=systemd:/b\n0::/c\n", ["memory/job", "memory", "c", "."]),
        ("3:pids:/a\n", ["memory", "."]),
        (None, ["memory", "."]),
    ],
)
def test_the_process_own_group_its_parents_and_the_roots(told, folders, tmp_path, monkeypatch):
    if told is not None:
        (tmp_path / "told").write_text(told)
    monkeypatch.setattr(groups, "_OWN", tmp_path / "told")
    assert groups.control_groups("memory") == [ROOT / folder for folder in folders]


def test_a_controller_that_shares_its_tree(tmp_path, monkeypatch):
    (tmp_path / "told").write_text("5:cpu,cpuacct:/a\n4:memory:/b\n")
    monkeypatch.setattr(groups, "_OWN", tmp_path / "told")
    assert groups.control_groups("cpu") == [ROOT / "cpu" / "a", ROOT / "cpu", ROOT]


@pytest.fixture
def child(request):
    """A group without a limit of its own in one that has one."""
    name = f"veneer-test-groups-{os.getpid()}"
    reasons = []
    for top, (file, limit) in zip((ROOT / request.param, ROOT), LIMITS[request.param], strict=True):
        parent = top / name
        try:
            (parent / "child").mkdir(parents=True)
            (parent / file).write_text(limit)
        except OSError as error:
            reasons.append(str(error))
            _remove(parent)
            continue
        yield parent / "child"
        _remove(parent)
        return
    pytest.skip(f"no {request.param} control group can be made here: {'; '.join(reasons)}")


def _remove(group: Path) -> None:
    for folder in (group / "child", group):
        if folder.is_dir():
            folder.rmdir()


def _in_group(group: Path, code: str) -> str:
    join = f"import os; from pathlib import Path; Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid()))"
    command = [sys.executable, "-c", f"{join}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout


@pytest.mark.parametrize("child", ["memory"], indirect=True)
def test_the_limit_of_a_real_parent_bounds_the_memory(child):
    said = _in_group(child, "from veneer.host_memory import usable_host_memory\nprint(usable_host_memory())")
    assert 0.95 * MEMORY < int(said) < 1.02 * MEMORY


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize("child", ["cpu"], indirect=True)
def test_the_limit_of_a_real_parent_bounds_the_cores(child):
    assert _in_group(child, "from veneer.threads import cores\nprint(cores())") == "1\n"
