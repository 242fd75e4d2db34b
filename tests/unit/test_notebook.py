"""What a notebook shows: one live line that is replaced, a link to the report; and nothing of it anywhere else."""

from __future__ import annotations

import html
import importlib
import io
import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from rich.console import Console

import veneer
from veneer.notebook import LiveLine, html_table, is_notebook, show_link
from veneer.training.callbacks import EvaluationRecord, StepRecord
from veneer.training.progress import RunProgress

pytestmark = pytest.mark.unit


class _Cell:
    """The outputs of a notebook's cell: what is displayed, by its id, and how often it was replaced."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []
        self.replaced = 0
        self._ids: dict[str, int] = {}

    def publish(self, data, metadata=None, *, transient=None, update=False, **_) -> None:
        name = (transient or {}).get("display_id")
        if update:
            self.replaced += 1
            self.outputs[self._ids[name]] = data
            return
        if name is not None:
            self._ids[name] = len(self.outputs)
        self.outputs.append(data)

    def text(self) -> str:
        return "\n".join(data["text/plain"].rstrip("\n") for data in self.outputs)


@pytest.fixture
def cell(monkeypatch, tmp_path):
    """This process as a kernel, so far as IPython's display and rich's consoles ask; what is shown is kept."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    interactive = pytest.importorskip("IPython.core.interactiveshell", reason="pip install -e '.[dev]'")
    outputs = _Cell()
    formatter = importlib.import_module("IPython.core.formatters").DisplayFormatter()
    shell = type("ZMQInteractiveShell", (), {"display_pub": outputs, "display_formatter": formatter})()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    monkeypatch.setattr(interactive.InteractiveShell, "initialized", lambda: True)
    monkeypatch.setattr(interactive.InteractiveShell, "instance", lambda: shell)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    return outputs


def _step(number: int, total: int = 40) -> StepRecord:
    return StepRecord(
        step=number, total=total, loss=1 / number, learning_rate=1e-3, gradient_norm=1.0, tokens=100 * number,
        tokens_per_second=250.0, peak_memory=1_500_000_000,
    )  # fmt: skip


def _run(console: Console, steps: int = 40) -> None:
    with RunProgress(console, steps, 0) as progress:
        progress.note("the model")
        for number in range(1, steps + 1):
            progress.on_step(_step(number, steps))


def test_a_run_has_one_live_line_in_a_notebook(cell):
    _run(Console())
    assert len(cell.outputs) == 2
    assert cell.replaced == 39
    note, line = cell.text().splitlines()
    assert note == "the model"
    assert re.fullmatch(r"step 40/40  loss 0\.025 · 250 tokens/s · 1\.5 GB · 0:00 left", line)
    assert line in html.unescape(cell.outputs[1]["text/html"])


def test_a_held_out_loss_does_not_split_the_live_line(cell):
    with RunProgress(Console(), 4, 0) as progress:
        progress.on_step(_step(1, 4))
        progress.on_evaluation(EvaluationRecord(step=1, loss=0.5, best=True))
        progress.on_step(_step(2, 4))
    assert [text.partition(":")[0] for text in cell.text().splitlines()][1:] == ["step 1"]
    assert "step 2/4  loss 0.500 · held-out 0.500" in cell.outputs[0]["text/plain"]


def test_two_runs_have_a_line_each(cell):
    _run(Console(), 3)
    _run(Console(), 3)
    assert [text.partition("  ")[0] for text in cell.text().splitlines()] == ["the model", "step 3/3"] * 2


def test_the_live_line_is_text_and_not_html(cell):
    LiveLine().show("a <b> & c")
    assert cell.outputs == [
        {"text/plain": "a <b> & c", "text/html": "<pre style='margin: 0'>a &lt;b&gt; &amp; c</pre>"}
    ]


def test_a_quiet_console_shows_nothing_in_a_notebook(cell, tiny_folder, rows_file, tmp_path):
    veneer.train(
        str(tiny_folder), data=str(rows_file), output=str(tmp_path / "run"), steps=2, console=Console(quiet=True)
    )
    assert cell.outputs == []


def test_plain_lines_anywhere_else():
    out = io.StringIO()
    _run(Console(file=out, width=200))
    lines = out.getvalue().splitlines()
    assert lines[0] == "the model"
    assert [line.partition("  ")[0] for line in lines[1:]] == [f"step {number}/40" for number in range(2, 41, 2)]


def test_ipython_in_a_terminal_is_a_terminal(monkeypatch):
    shell = type("TerminalInteractiveShell", (), {})()
    monkeypatch.setattr("builtins.get_ipython", lambda: shell, raising=False)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    assert not is_notebook(console)
    _run(console)
    assert "40/40" in out.getvalue()
    assert "<pre" not in out.getvalue()


def test_a_console_forced_to_be_a_notebooks_is_none_without_ipython(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    console = Console(force_jupyter=True)
    assert console.is_jupyter
    assert not is_notebook(console)
    _run(console)


def test_nor_is_it_in_a_process_without_a_shell():
    pytest.importorskip("IPython", reason="pip install -e '.[dev]'")
    assert not is_notebook(Console(force_jupyter=True))


@pytest.mark.parametrize("name", ["run", "my runs/ü & 50 %", "a#1?b", "<b>'x'\"", "a:b"])
def test_a_link_leads_to_the_file_whatever_its_name(name, cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(name) / "report.html"
    file.parent.mkdir(parents=True)
    file.touch()
    show_link(file, "Report: ")
    (output,) = cell.outputs
    assert output["text/plain"] == f"Report: {name}/report.html"
    found = re.fullmatch(r"Report: <a href='([^'<>\"&#?\s]+)' target='_blank'>([^<>]+)</a>", output["text/html"])
    assert found
    assert not re.match(r"\w+:", found[1])  # which would be another scheme
    assert Path(unquote(found[1])).samefile(file)
    assert html.unescape(found[2]) == str(file)


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_a_link_to_an_absolute_path_is_seen_from_the_notebook(place, cell, tmp_path, monkeypatch):
    notebook = tmp_path / "notes"
    file = (notebook if place == "inside" else tmp_path) / "run" / "report.html"
    notebook.mkdir()
    monkeypatch.chdir(notebook)
    show_link(file, "Report: ")
    address = "run/report.html" if place == "inside" else "../run/report.html"
    assert f"href='{address}'" in cell.outputs[0]["text/html"]


@pytest.fixture
def options(tiny_folder, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {"model": str(tiny_folder), "data": str(rows_file), "output": "my runs/<first>", "steps": 2, "rank": 2}


def test_a_run_and_its_resumption_end_with_a_link_to_the_report(options, cell):
    veneer.train(**options)
    first, cell.outputs = cell.outputs[-1], []
    veneer.resume(options["output"], steps=3)
    for output in (first, cell.outputs[-1]):
        assert output["text/plain"] == "Report: my runs/<first>/report.html"
        assert "href='my%20runs/%3Cfirst%3E/report.html'" in output["text/html"]
    assert Path("my runs/<first>/report.html").is_file()


def test_no_report_is_written_outside_a_notebook(options):
    veneer.train(**options, console=Console(file=io.StringIO()))
    assert not Path(options["output"], "report.html").exists()


def test_a_report_that_cannot_be_written_does_not_lose_the_result(options, cell, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("veneer.commands.report.write_text", full)
    assert veneer.train(**options).steps == 2
    assert cell.text().splitlines()[-1] == "The report cannot be written: [Errno 28] No space left on device"


def test_a_table_escapes_its_cells_and_its_caption():
    table = html_table(("a", "<i>"), [("x & y", 1)], "<b>")
    assert "<caption>&lt;b&gt;</caption>" in table
    assert "&lt;i&gt;</th>" in table
    assert '<td style="text-align: left">x &amp; y</td><td style="text-align: right">1</td>' in table
