"""A study is run once, goes on where it stopped, and tells what it found; each job in a process of its own."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest

from veneer.errors import ConfigError, DataError, DivergedError, TrainingError
from veneer.files import locked
from veneer.studies import run
from veneer.studies.config import StudyOptions
from veneer.studies.folder import columns_of, read_study_rows, write_study_rows
from veneer.studies.kinds import STUDIES
from veneer.studies.rank import RankStudy
from veneer.studies.run import in_a_process, run_study
from veneer.studies.study import MEASURED, Job, Study, key_of
from veneer.studies.work import DIVERGED, work
from veneer.threads import cores

pytestmark = pytest.mark.unit


class CountingStudy(Study):
    """Three numbers, and after them their double."""

    name = "counting"
    title = "How far can it count?"
    columns: ClassVar = {"number": "the number"}
    done: ClassVar[list[int]] = []

    def jobs(self, rows):
        first = [Job(self.name, "count", {"number": seed}) for seed in self.options.seeds]
        there = {row["run"] for row in rows}
        return first + [Job(self.name, "double", job.options) for job in first if job.key in there]

    @classmethod
    def work(cls, what, options, runs):
        cls.done.append((what, options["number"]))
        number = options["number"] * (2 if what == "double" else 1)
        return [dict.fromkeys(MEASURED) | {"number": number, "loss": 0.5, "seconds": 1.0}]

    def findings(self, rows):
        return f"The sum is {sum(row['number'] for row in rows)}."

    def draw(self, rows, folder):
        (folder / "plot.png").write_bytes(b"")
        return ["plot.png"]


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setitem(STUDIES, "counting", CountingStudy)
    monkeypatch.setattr(run, "in_a_process", work)
    monkeypatch.setattr(CountingStudy, "done", [])
    return CountingStudy.done


def _study(folder: Path, seeds=(1, 2, 3), **more) -> list[str]:
    said: list[str] = []
    run_study("counting", StudyOptions(seeds=list(seeds), output=str(folder), **more), said.append)
    return said


def test_a_study_leaves_rows_a_plot_and_what_was_found(counting, tmp_path):
    said = _study(tmp_path / "s")
    assert counting == [("count", 1), ("count", 2), ("count", 3), ("double", 1), ("double", 2), ("double", 3)]
    assert said[0] == f"counting: 3 runs to do; {tmp_path / 's'} has 0 rows"
    assert said[1] == "counting: count, number 1: loss 0.500, 1 s"
    rows = list(csv.DictReader((tmp_path / "s" / "runs.csv").open()))
    assert [row["number"] for row in rows] == ["1", "2", "3", "2", "4", "6"]
    assert list(rows[0]) == ["run", "number", *MEASURED]
    told = json.loads((tmp_path / "s" / "study.json").read_text())
    assert told["findings"] == "The sum is 18."
    assert (told["name"], told["plots"], told["finished"]) == ("counting", ["plot.png"], True)
    assert told["runs"] == [row["run"] for row in rows]
    assert told["columns"].keys() == rows[0].keys()
    assert {"torch", "python", "processor"} <= told["environment"].keys()
    assert "ray" not in told["options"]
    summary = (tmp_path / "s" / "summary.md").read_text()
    assert summary == "# How far can it count?\n\nThe sum is 18.\n\n![plot.png](plot.png)\n"


def test_what_was_run_is_not_run_again_and_more_is_added(counting, tmp_path):
    _study(tmp_path / "s")
    counting.clear()
    _study(tmp_path / "s")
    assert counting == []
    _study(tmp_path / "s", seeds=(3, 7))
    assert counting == [("count", 7), ("double", 7)]
    assert json.loads((tmp_path / "s" / "study.json").read_text())["findings"] == "The sum is 30.", "of these alone"
    assert len(read_study_rows(tmp_path / "s", CountingStudy)) == 8, "the others stay"


def test_a_study_that_fails_on_its_way_keeps_its_rows(counting, tmp_path, monkeypatch):
    def failing(job, runs):
        if job.options["number"] == 3:
            raise TrainingError("no more")
        return work(job, runs)

    monkeypatch.setattr(run, "in_a_process", failing)
    with pytest.raises(TrainingError, match="no more"):
        _study(tmp_path / "s")
    assert [row["number"] for row in read_study_rows(tmp_path / "s", CountingStudy)] == [1, 2]
    assert json.loads((tmp_path / "s" / "study.json").read_text())["finished"] is False
    monkeypatch.setattr(run, "in_a_process", work)
    counting.clear()
    _study(tmp_path / "s")
    assert counting == [("count", 3), ("double", 1), ("double", 2), ("double", 3)]


def test_a_run_that_diverges_leaves_the_others_to_be_done(counting, tmp_path, monkeypatch):
    def diverging(job, runs):
        if job.what == "count" and job.options["number"] < 3:
            raise DivergedError(f"{job} failed: The loss is not finite.")
        return work(job, runs)

    monkeypatch.setattr(run, "in_a_process", diverging)
    said = (
        r"^counting: count, number 1 failed: The loss is not finite\. So did 1 more\. All other runs of the study that "
        r"could be done are done\.$"
    )
    with pytest.raises(TrainingError, match=said):
        _study(tmp_path / "s")
    assert counting == [("count", 3), ("double", 3)]
    told = json.loads((tmp_path / "s" / "study.json").read_text())
    assert (told["finished"], told["runs"]) == (
        False,
        [row["run"] for row in read_study_rows(tmp_path / "s", CountingStudy)],
    )


def test_what_was_found_stays_until_something_new_is_there(counting, tmp_path, monkeypatch):
    _study(tmp_path / "s")
    before = (tmp_path / "s" / "study.json").read_bytes()
    monkeypatch.setattr(run, "in_a_process", lambda job, runs: (_ for _ in ()).throw(TrainingError("no such model")))
    with pytest.raises(TrainingError, match="no such model"):
        _study(tmp_path / "s", seeds=[8])
    assert (tmp_path / "s" / "study.json").read_bytes() == before


def test_two_processes_are_not_at_one_study(counting, tmp_path):
    with (
        locked(tmp_path / "s", wait=False),
        pytest.raises(TrainingError, match=r"^Another process is at the study in "),
    ):
        _study(tmp_path / "s")
    assert counting == []
    _study(tmp_path / "s")


def test_a_folder_of_another_study_is_refused(counting, tmp_path):
    rows = [dict.fromkeys(columns_of(RankStudy)) | {"run": "a", "rank": 1}]
    write_study_rows(tmp_path / "s", RankStudy, rows)
    with pytest.raises(DataError, match=r"has the columns run, how, rank, .* not those of the study counting"):
        _study(tmp_path / "s")
    assert read_study_rows(tmp_path / "s", RankStudy) == rows
    assert counting == []


@pytest.mark.parametrize(("threads", "said"), [("3", 3), ("2,1", None), ("", None)])
def test_the_number_of_threads_is_what_torch_gets(counting, tmp_path, monkeypatch, threads, said):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    _study(tmp_path / "s")
    told = json.loads((tmp_path / "s" / "study.json").read_text())
    assert told["environment"]["threads"] == (said or cores())


def test_the_process_that_runs_a_study_loads_no_torch():
    """Whose peak memory a job's process would begin with."""
    code = "import sys; import veneer.studies.run; sys.exit(not {'torch', 'matplotlib'}.isdisjoint(sys.modules))"
    assert run.subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_key_is_of_all_that_defines_a_run():
    job = Job("rank", "trained", {"rank": 2, "run": {"seed": 0}})
    same = Job("rank", "trained", {"run": {"seed": 0}, "rank": 2})
    assert job.key == same.key == key_of(["trained", {"rank": 2, "run": {"seed": 0}}])
    others = (Job("rank", "cut", job.options), Job("rank", "trained", {"rank": 2, "run": {"seed": 1}}))
    assert len({job.key, *(other.key for other in others)}) == 3


@pytest.mark.parametrize("key", ["8082631e5967", "123456789012", "00000000000a"])
def test_a_key_that_looks_like_a_number_is_read_back_as_it_is(tmp_path, key):
    write_study_rows(tmp_path, CountingStudy, [dict.fromkeys(MEASURED) | {"run": key, "number": 7, "loss": 0.5}])
    (row,) = read_study_rows(tmp_path, CountingStudy)
    assert (row["run"], row["number"], row["loss"], row["accuracy"]) == (key, 7, 0.5, None)


def test_a_study_of_an_unknown_name_is_refused_with_the_nearest(refused):
    assert refused("study", "rnk").startswith(
        "There is no study 'rnk'. Did you mean 'rank'? There are: learning-rate, rank,"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": [0, 2]}, "ranks holds 0"),
        ({"seeds": [1, 1]}, "holds a value twice"),
        ({"seeds": []}, "seeds"),
        ({"sed": [1]}, "Did you mean 'seeds'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        StudyOptions(**options)


def test_a_file_that_is_no_studys_is_refused(counting, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"runs\.csv has the columns a, b, not those of the study counting"):
        _study(tmp_path / "s")
    assert counting == [], "before anything is run"
    assert not (tmp_path / "s" / "study.json").exists()


_STUDY_THAT_DIES = """
import os, signal, sys
from pathlib import Path
from veneer.studies import work
def die(job, runs):
    tries = Path(runs) / "tries"
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if len(tries.read_text()) < int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"run": job.key, "number": 1}]
work.work = die
work.main()
"""


@pytest.mark.parametrize(("dies_before", "done"), [(2, True), (9, False)])
def test_a_job_whose_process_is_killed_is_tried_again(tmp_path, monkeypatch, dies_before, done):
    original = run.subprocess.run

    def with_a_script(command, **how):
        return original([sys.executable, "-c", _STUDY_THAT_DIES, *command[3:], str(dies_before)], **how)

    monkeypatch.setattr(run.subprocess, "run", with_a_script)
    job = Job("rank", "trained", {})
    if done:
        assert in_a_process(job, tmp_path) == [{"run": job.key, "number": 1}]
    else:
        with pytest.raises(TrainingError, match="rank: trained failed: it was killed"):
            in_a_process(job, tmp_path)
    assert (tmp_path / "tries").read_text() == "x" * min(dies_before, 3)


def test_a_job_that_diverges_is_told_from_one_that_fails(tmp_path, monkeypatch):
    original = run.subprocess.run

    def diverging(command, **how):
        return original(
            [sys.executable, "-c", f"import sys; print('Not finite.', file=sys.stderr); sys.exit({DIVERGED})"], **how
        )

    monkeypatch.setattr(run.subprocess, "run", diverging)
    with pytest.raises(DivergedError, match=r"^rank: trained failed: Not finite\.$"):
        in_a_process(Job("rank", "trained", {}), tmp_path)


_STARTER = """
import sys
from pathlib import Path
from veneer.studies import run
from veneer.studies.study import Job
original = run.subprocess.run
run.subprocess.run = lambda command, **how: original([sys.executable, "-c", sys.argv[1], *command[3:]], **how)
run.in_a_process(Job("rank", "trained", {}), Path(sys.argv[2]))
"""
_WAITS = """
import os, sys, time
from pathlib import Path
from veneer.studies import work
def waiting(job, runs):
    (runs / "pid").write_text(f"{os.getpid()}.")
    time.sleep(60)
work.work = waiting
work.main()
"""


def test_a_job_ends_with_the_process_that_started_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", _STARTER, _WAITS, tmp_path]) as starter:
        pid = tmp_path / "pid"
        while not (pid.exists() and pid.read_text().endswith(".")):
            assert starter.poll() is None
            time.sleep(0.05)
        job = int(pid.read_text()[:-1])
        assert _runs(job)
        starter.kill()
    for _ in range(200):
        if not _runs(job):
            break
        time.sleep(0.05)
    assert not _runs(job)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_what_a_job_refuses_is_said_in_its_own_words(tmp_path, rows_file):
    options = {"model": str(tmp_path / "none"), "data": str(rows_file), "seed": 0, "steps": 1, "held_out": 8}
    with pytest.raises(TrainingError, match=r"^rank: trained, rank 2, seed 0 failed: .*none"):
        in_a_process(Job("rank", "trained", {"rank": 2, "run": options}), tmp_path)


def test_without_ray_one_sentence_says_how_to_get_it(counting, tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.studies.cluster.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^--ray needs Ray, which is not installed: pip install 'veneer\[ray\]'\.$"):
        _study(tmp_path / "s", ray="auto")


@pytest.fixture(scope="module")
def ray():
    """A Ray cluster of two workers on this machine."""
    found = pytest.importorskip("ray")
    # A worker cannot import this file, so what it is to run travels with the task.
    found.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    found.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()


def _killed_once(job, runs):
    """Done by two workers; the one with the first job is killed, the first time."""
    folder = Path(runs)
    (folder / f"{job.key}-{os.getpid()}").touch()
    if job.options["number"] == 1 and len(list(folder.glob(f"{job.key}-*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return [dict.fromkeys(MEASURED) | {"run": job.key, "number": job.options["number"], "loss": 1.0, "seconds": 0}]


def test_over_ray_a_killed_worker_loses_its_run_alone(ray, counting, tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.studies.cluster._work", _killed_once)
    (tmp_path / "runs").mkdir()
    _study(tmp_path / "s", ray="auto")
    assert sorted(row["number"] for row in read_study_rows(tmp_path / "s", CountingStudy)) == [1, 1, 2, 2, 3, 3]
    tried = [path.name.split("-")[0] for path in (tmp_path / "runs").iterdir()]
    counts = {key: tried.count(key) for key in tried}
    killed = {Job("counting", what, {"number": 1}).key for what in ("count", "double")}
    assert {key for key, count in counts.items() if count == 2} == killed
    assert len(counts) == 6


def _diverges_once(job, runs):
    if job.options["number"] == 1:
        raise DivergedError("The loss is not finite.")
    return [dict.fromkeys(MEASURED) | {"run": job.key, "number": job.options["number"], "loss": 1.0, "seconds": 0}]


def test_over_ray_a_run_that_diverges_leaves_the_others_to_be_done(ray, counting, tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.studies.cluster._work", _diverges_once)
    said = r"^counting: count, number 1 failed: The loss is not finite\. All other runs"
    with pytest.raises(TrainingError, match=said):
        _study(tmp_path / "s", ray="auto")
    assert sorted(row["number"] for row in read_study_rows(tmp_path / "s", CountingStudy)) == [2, 2, 3, 3]


def _refused(job, runs):
    raise DataError("There is no file rows.jsonl.")


def _always_killed(job, runs):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("job", "said"),
    [(_refused, r"There is no file rows\.jsonl\.$"), (_always_killed, "The worker died")],
)
def test_over_ray_a_job_that_fails_is_one_sentence(ray, counting, tmp_path, monkeypatch, job, said):
    monkeypatch.setattr("veneer.studies.cluster._work", job)
    with pytest.raises(TrainingError, match=f"^counting: count, number 1 failed: {said}"):
        _study(tmp_path / "s", seeds=[1], ray="auto")
