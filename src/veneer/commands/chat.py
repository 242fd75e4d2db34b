"""A conversation in the terminal, with base and adapter side by side when asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from veneer.commands.generate import said, say_what_is_not_followed, sides, with_asked_system
from veneer.generation.config import GenerateOptions
from veneer.runs.opened import open_named
from veneer.terminal import harmless
from veneer.unix import has_line_editor, termios


def talk(source: str | Path, **options: Any) -> None:
    """Read lines until an empty one or the end of the input, and print the answer of a run, an adapter or a model to
    each.

    ``options``: those of `GenerateOptions`. Raises ConfigError for an option that does not exist or makes no sense, and
    ModelError for what is no model.
    """
    asked = GenerateOptions(**options)
    opened = with_asked_system(open_named(source, asked.compute, asked.device), asked)
    names = sides(opened, asked)
    say_what_is_not_followed(opened, asked)
    histories: dict[str, tuple[dict[str, str], ...]] = dict.fromkeys(names, ())
    edited = sys.stdin.isatty() and sys.stdout.isatty() and has_line_editor()
    if sys.stdin.isatty():
        click.echo("An empty line or Ctrl-D ends the conversation, /new starts another one.")
    while True:
        try:
            line = click.prompt("you", prompt_suffix="> ", default="", show_default=False)
        except click.Abort:
            return
        if not line.strip():
            return
        if line.strip() == "/new":
            histories = dict.fromkeys(names, ())
            continue
        with _typed_ahead() if edited else nullcontext():
            for name in names:
                turns = (*histories[name], {"role": "user", "content": line.replace("\\n", "\n")})
                click.echo(f"{name}> ", nl=False)
                text = _printed(said(opened, turns, name, asked))
                histories[name] = (*turns, {"role": "assistant", "content": text})


@contextmanager
def _typed_ahead() -> Iterator[None]:
    """While answers are printed, what is typed is kept for the next prompt, where the line editor shows it, and does
    not appear amid the answer."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)  # the flushing form would drop what is typed
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _printed(pieces: Iterator[str]) -> str:
    """The text of these pieces, each printed as it comes, without the space before the first word."""
    text = ""
    for piece in pieces:
        click.echo(harmless(piece if text.strip() else piece.lstrip()), nl=False)
        text += piece
    click.echo()
    return text
