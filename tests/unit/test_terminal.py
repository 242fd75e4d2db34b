"""Texts of rows, files and models are printed, and never act on the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from veneer import cli as module
from veneer import terminal
from veneer.terminal import harmless

pytestmark = pytest.mark.unit
EVIL = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31m\rd\x00\u202e"
SEEN = r"a\x1b]0;owned\x07b\x1b[2Jc\x9b31m\rd\x00" + "\\u202e"


def test_what_acts_is_written_out_and_the_rest_is_as_it_was():
    assert harmless(EVIL) == SEEN
    assert harmless("grün\t😀\n⟦x⟧ \u200d") == "grün\t😀\n⟦x⟧ \u200d"
    assert harmless("\ud800") == r"\ud800"


@pytest.mark.parametrize("make", [str, Text, lambda text: _table(text)], ids=["text", "styled", "table"])
def test_a_console_prints_them_harmless_and_keeps_its_own_colours(make, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "Console", lambda **_: Console(file=shown, force_terminal=True, width=200))
    terminal.terminal().print(make(EVIL), style="bold", markup=False)
    assert "\x1b[1m" in shown.getvalue()
    left = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", left)
    assert r"a\x1b]0;owned" in left


def _table(text):
    table = Table()
    table.add_column(Text("column"))
    table.add_row(Text(text))
    return table


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--model", "tiny"]], ids=["rows", "tokens"])
def test_rows_that_are_inspected_do_not_act(arguments, tmp_path, tiny_folder, run_command):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": f"{EVIL}:", "completion": " x", "more\x1b[2J": 1}) + "\n")
    verb, *rest = [str(tiny_folder) if part == "tiny" else part for part in arguments]
    shown = run_command(verb, str(rows), *rest)
    assert "\x1b" not in shown
    assert "\r" not in shown.replace("\r\n", "\n")
    assert r"\x1b[2J" in shown


def test_a_refusal_does_not_act(tmp_path, run_command):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"\x1b[2Jquestion": "a"}) + "\n")
    shown = run_command("inspect", str(rows))
    assert "\x1b" not in shown
    assert "Error: " in shown


@pytest.fixture
def run_command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["veneer", *arguments])
        monkeypatch.setattr(module, "settle", lambda: None)
        with contextlib.suppress(SystemExit):
            module.main()
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


def test_a_terminal_of_few_letters_gets_the_others_written_out(tiny_folder, rows_file):
    command = [sys.executable, "-m", "veneer", "inspect", rows_file, "--model", tiny_folder]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u27e6" in done.stdout
