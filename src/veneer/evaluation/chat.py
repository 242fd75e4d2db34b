"""A conversation in the terminal, with base and adapter side by side when asked for."""

from __future__ import annotations

import sys

import click

from veneer.commands.verbs import GenerateOptions
from veneer.errors import ConfigError
from veneer.evaluation.opened import open_named
from veneer.evaluation.verb import say, sides


def talk(source: str, options: GenerateOptions) -> None:
    """Read lines until an empty one or the end of the input, and answer each."""
    opened = open_named(source)
    names = sides(opened, options)
    histories: dict[str, tuple[dict[str, str], ...]] = dict.fromkeys(names, ())
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
        if line.startswith("/"):
            raise ConfigError(f"There is no command {line.split()[0]!r} in a chat; there is /new.")
        for name in names:
            asked = (*histories[name], {"role": "user", "content": line.replace("\\n", "\n")})
            text = say(opened, asked, name, options)
            histories[name] = (*asked, {"role": "assistant", "content": text})
            click.echo(f"{name}> {text.strip()}")
