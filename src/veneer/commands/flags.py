"""pydantic fields → click parameters: what a verb takes is declared once, and help, YAML and flags agree.

No torch here or in the option classes: ``--help`` answers at once.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from veneer.commands.completion import completer
from veneer.errors import ConfigError
from veneer.options import Options, named_here


class Verb(click.Command):
    """A command that answers other libraries' names of its options with its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flag = error.option_name.removeprefix("--").replace("-", "_")
            here = named_here(flag, (parameter.name or "" for parameter in self.params))
            if here is None:
                raise
            raise click.UsageError(f"No such option '{error.option_name}': here it {here}.", ctx) from None


def flags(
    options: type[Options], *, first: tuple[str, ...] = (), only: tuple[str, ...] | None = None
) -> Callable[[Any], Any]:
    """A decorator that gives a command one flag for each field of ``options``, those named ``first`` at the top; or for
    ``only`` these.

    A flag that is not given is not passed, so that a YAML file's value or the field's default holds.
    """
    names = only or [*first, *(name for name in options.model_fields if name not in first)]

    def decorate(command: Any) -> Any:
        for name in reversed(names):
            command = _flag(name, options.model_fields[name])(command)
        return command

    return decorate


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The flags that the user set, their texts read as lists and mappings where the option is one."""
    return {name: value for name, value in values.items() if value is not None}


def _flag(name: str, field: FieldInfo) -> Callable[[Any], Any]:
    kind = field.annotation
    flag = f"--{name.replace('_', '-')}"
    text = field.description or ""
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("texts"):
        return _texts(flag, name, f"{text} May be given several times; a written \\n is a line break.")
    if kind is bool:
        return click.option(f"{flag}/--no-{name.replace('_', '-')}", name, default=None, help=_help(text, field))
    if get_origin(kind) is Literal:
        return click.option(
            flag, name, type=click.Choice([str(arg) for arg in get_args(kind)]), help=_help(text, field)
        )
    return click.option(
        flag, name, callback=_reader(name, kind), metavar=_metavar(kind), help=_help(text, field),
        shell_complete=completer(name, _parts(kind)),
    )  # fmt: skip


def _texts(flag: str, name: str, text: str) -> Callable[[Any], Any]:
    """A flag of whole texts, commas included, one each time that it is given."""

    def read(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[str] | None:
        return [each.replace("\\n", "\n") for each in texts] or None

    return click.option(flag, name, multiple=True, callback=read, metavar="TEXT", help=text)


def _help(text: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    shown = not field.is_required() and default not in (None, [], {}, "") and "efault:" not in text
    return f"{text}  [{str(default).lower() if isinstance(default, bool) else default}]" if shown else text


def _reader(name: str, kind: Any) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    parts = _parts(kind)

    def read(context: click.Context, parameter: click.Parameter, text: str | None) -> Any:
        if text is None:
            return None
        if any(get_origin(part) is dict for part in parts) and not any(
            get_origin(part) is Literal and text in get_args(part) for part in parts
        ):
            return _mapping(name, text)
        if any(get_origin(part) is list for part in parts):
            # One regular expression stays a string; names with commas between them are a list.
            plain = all(character.isalnum() or character in "_.,- " for character in text)
            if plain and text != "all-linear":
                return [item.strip() for item in text.split(",") if item.strip()]
        return text

    return read


def _mapping(name: str, text: str) -> dict[str, str]:
    pairs = [pair.rpartition("=") for pair in text.split(",")]
    if not all(equals for _, equals, _ in pairs):
        raise ConfigError(f"--{name.replace('_', '-')} {text!r} is not of the form name=value,name=value.")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _metavar(kind: Any) -> str:
    parts = _parts(kind)
    if any(get_origin(part) is dict for part in parts):
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        return "|".join(["NAME=VALUE,…", *words])
    if any(get_origin(part) is list for part in parts):
        return "A,B,…"
    name = {int: "N", float: "X"}.get(parts[0], "TEXT")
    return f"{name}|auto" if any(get_origin(part) is Literal and "auto" in get_args(part) for part in parts) else name


def _parts(kind: Any) -> tuple[Any, ...]:
    """The types that an option may have, without the limits of their values."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(get_args(part)[0] if get_origin(part) is Annotated else part for part in parts)
