"""The command line in this process: the real main(), with what it printed and the code it exits with."""

from __future__ import annotations

import io
import sys
from typing import NamedTuple

import pytest

from veneer.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def veneer_command(monkeypatch, capsys):
    """A function from arguments to the outcome; any exception but the exit itself fails the test as a traceback."""

    def run(*arguments, stdin="", terminal=False) -> Outcome:
        given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        given.isatty = lambda: terminal
        monkeypatch.setattr(sys, "argv", ["veneer", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", given)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(veneer_command):
    """A function from arguments to the one sentence of a refusal, which it checks for its form."""

    def run(*arguments, code=1, stdin="") -> str:
        outcome = veneer_command(*arguments, stdin=stdin)
        assert (outcome.code, outcome.out) == (code, ""), outcome
        assert "Traceback" not in outcome.err
        # A refused command line may be told with its usage before; all else is "Error: " and the message.
        before, error, message = outcome.err.partition("Error: ")
        assert error
        assert not before or code == 2
        return message.strip()

    return run
