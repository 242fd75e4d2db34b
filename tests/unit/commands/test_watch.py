"""veneer watch: a run in the terminal, before it begins, while it goes on, and when it has ended."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from veneer.commands import watch
from veneer.runs.folder import RunFolder
from veneer.runs.history import RunHistory
from veneer.training.metrics import Metrics

pytestmark = pytest.mark.unit


def _terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=90, height=40, _environ={"TERM": "xterm"})


def _said(console: Console) -> str:
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", console.file.getvalue())


def test_from_before_the_run_begins_to_its_end(run_folder, tmp_path, monkeypatch):
    """Each look at the run is followed by what happens next."""
    made, folder = run_folder(12, name="made"), tmp_path / "runs" / "first"
    lines, held = RunFolder(made).metrics(), []
    looks = []

    def begin():
        shutil.copytree(made, folder)
        (folder / "metrics.jsonl").unlink()

    def write(*some):
        held[:] = held or [Metrics(RunFolder(folder).metrics_file, RunFolder(folder).tensorboard, 0)]
        for record in some:
            held[0].write(**record)

    steps = iter(
        [lambda: None, begin, write, lambda: write(*lines[:5]), lambda: write(*lines[5:]), lambda: held[0].close()]
        + [lambda: None] * 3
    )

    asleep, here = time.sleep, threading.current_thread()

    def sleep(seconds):
        if threading.current_thread() is not here:  # that of another test, whose end it waits for
            return asleep(seconds)
        looks.append(_said(console))
        next(steps)()

    console = _terminal()
    monkeypatch.setattr(watch.time, "sleep", sleep)
    watch.watch(folder, console)
    new = [" ".join(after[len(before) :].split()) for before, after in zip(["", *looks], looks, strict=False)]
    assert "Waiting for it." in new[0]
    assert "Waiting for it." in new[1]
    assert "starting" in new[2]
    assert "step 0/20" in new[3]
    assert "in progress" in new[3]
    assert "step 4/20" in new[4]
    assert "time left" in new[4]
    assert "step 12/20 in progress" in new[5]
    assert "0.5500 at step 10" in new[5]
    assert "1.50 GB" in new[5]
    last = _said(console)[len(looks[-1]) :]
    assert f"nobody trains it: veneer train --resume {folder}" in " ".join(last.split())


def test_it_is_there_at_once_because_it_loads_no_torch(finished_run):
    code = (
        "import sys; from veneer.cli import main; main(); "
        "print('LOADED', *sorted({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, "watch", str(finished_run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_where_nothing_can_be_redrawn_it_is_printed_once(finished_run, veneer_command):
    done = veneer_command("watch", finished_run)
    assert (done.code, done.err) == (0, "")
    assert re.search(r"step 100/100\s+finished", done.out)
    assert done.out.count("held-out loss") == 1
    assert re.search(r"accuracy\s+100\.0 % at step 100, largest class 56\.2 %\s+[▁-█]{6}", done.out)


def test_a_run_that_is_not_there_is_refused_where_nothing_can_be_redrawn(run_folder, tmp_path, refused):
    folder = run_folder(3)
    message = refused("watch", tmp_path / "rum")
    assert message == f"There is no run in {tmp_path / 'rum'}: it has no config.yaml. Did you mean '{folder}'?"


def test_the_budget_of_adalora_and_a_prediction_are_shown(run_folder):
    folder = run_folder(12, method="adalora", files={"plan.json": {"peak": 1_650_000_000}})
    lines = [{**record, "budget": 84} if "loss" in record else record for record in RunFolder(folder).metrics()]
    metrics = Metrics(RunFolder(folder).metrics_file, RunFolder(folder).tensorboard, 0)
    for record in lines:
        metrics.write(**record)
    console = Console(file=io.StringIO(), width=90)
    watch.watch(folder, console)
    metrics.close()
    said = _said(console)
    assert "84 triplets in force" in said
    assert "1.50 GB, predicted 1.65 GB" in said
    assert "time left" in said


def test_the_chart_is_as_high_as_its_values():
    lines = watch.chart([4.0, 3.0, 2.0, 1.0], 40).plain.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("4 │█")
    assert lines[-1].startswith("1 │███▁")
    assert watch.sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert watch.sparkline([2.0, 2.0]) == "▄▄"
    wide = watch.chart([float(x) for x in range(1000)], 60).plain.splitlines()
    assert max(map(len, wide)) <= 60


def _at(width, folder, home):
    """The lines that watch prints in a terminal of this width, whose user is in the folder ``home``."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=60, _environ={"TERM": "xterm"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        console.print(watch.screen(RunHistory.read(folder.relative_to(home)), width))
    return [line.rstrip() for line in _said(console).splitlines()]


def _measured(folder, evaluations, best):
    """A long run whose numbers are long, with accuracies."""
    path = RunFolder(folder).metrics_file
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines += [
        {
            "step": 10_000 + n,
            "held_out_loss": 1 / (n + 1),
            "held_out_perplexity": 2.0,
            "held_out_accuracy": n / evaluations,
        }
        for n in range(evaluations)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mark = RunFolder(folder).best / "step"
    mark.parent.mkdir(parents=True)
    mark.write_text(str(best))


def test_no_line_is_wider_than_eighty_columns_or_wraps(run_folder, tmp_path):
    folder = run_folder(12, total=120_000, name="a-run-with-a-long-name", files={"plan.json": {"peak": 1_650_000_000}})
    _measured(folder, 60, 10_059)
    lines = _at(80, folder, tmp_path)
    assert max(map(len, lines)) <= 80
    assert lines[:3] == [
        "a-run-with-a-long-name",
        "step 12/120,000  not finished, and nobody trains it:",
        "veneer train --resume a-run-with-a-long-name",
    ]
    names = ["loss", "held-out loss", "accuracy", "tokens a second", "learning rate", "peak memory"]
    assert [line.split("  ")[0] for line in lines[-6:]] == names, "a line that wraps begins with no name"
    assert re.search(r"held-out loss +0.0167 at step 10,059, best 0.0167 at step 10,059  [▁-█]{8,}$", lines[-5])
    assert re.search(r"accuracy +98.3 % at step 10,059  [▁-█]{30,}$", lines[-4])


def test_the_head_is_one_line_where_it_fits(run_folder, tmp_path):
    folder = run_folder(12, name="r")
    assert _at(80, folder, tmp_path)[0] == "r  step 12/20  not finished, and nobody trains it: veneer train --resume r"


def test_a_run_without_accuracy_has_none_and_one_measurement_is_not_repeated(run_folder, tmp_path):
    folder = run_folder(12)
    assert not any("accuracy" in line for line in _at(80, folder, tmp_path))
    _measured(folder, 1, 10_000)
    (line,) = [line for line in _at(80, folder, tmp_path) if line.startswith("accuracy")]
    assert line.split(maxsplit=1)[1] == "0.0 % at step 10,000"


def test_a_command_that_is_longer_than_the_terminal_is_not_cut(run_folder, tmp_path):
    folder = run_folder(12, name="n" * 70)
    assert f"veneertrain--resume{folder.name}" in "".join(_at(80, folder, tmp_path)).replace(" ", "")
