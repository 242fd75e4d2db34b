"""What a shell completes for the values of options and arguments. No torch here: a shell asks at each Tab."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args, get_origin

from click import Context, Parameter
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from veneer.data.bbc import BBC_TOPICS
from veneer.data.forms import FORMS, MODES
from veneer.device import NAMES as NAMES_OF_DEVICES
from veneer.models.gguf_splits import NAMES
from veneer.models.packaged import PACKAGED_MODELS
from veneer.studies.config import KINDS

Items = list[CompletionItem[str]]
Completer = Callable[[Context, Parameter, str], Items]


def paths(context: Context, parameter: Parameter, incomplete: str) -> Items:
    """Files and folders."""
    return [CompletionItem(incomplete, type="file")]


def folders(context: Context, parameter: Parameter, incomplete: str) -> Items:
    """Folders alone: runs, adapters, studies."""
    return [CompletionItem(incomplete, type="dir")]


def models(context: Context, parameter: Parameter, incomplete: str) -> Items:
    """Files and folders, and the names of the packaged models that are installed."""
    installed = [name for name, packaged in PACKAGED_MODELS.items() if packaged.path() is not None]
    return [*paths(context, parameter, incomplete), *_starting(incomplete, installed)]


def rows(context: Context, parameter: Parameter, incomplete: str) -> Items:
    """Files and folders, and the name of the packaged rows."""
    return [*paths(context, parameter, incomplete), *_starting(incomplete, [BBC_TOPICS])]


def templates(context: Context, parameter: Parameter, incomplete: str) -> Items:
    """Files, and the ways and forms of rows in a chat template that have names."""
    return [*paths(context, parameter, incomplete), *_starting(incomplete, [*MODES, *FORMS])]


def devices(context: Context, parameter: Parameter, incomplete: str) -> Items:
    """What a device may be called."""
    return _starting(incomplete, NAMES_OF_DEVICES)


def studies(context: Context, parameter: Parameter, incomplete: str) -> Items:
    """The kinds of studies."""
    return _starting(incomplete, KINDS)


def splits(context: Context, parameter: Parameter, incomplete: str) -> Items:
    """llama.cpp's names of how a tokenizer splits text."""
    return _starting(incomplete, NAMES)


def anything(context: Context, parameter: Parameter, incomplete: str) -> Items:
    """What inspect looks at: models, adapters, runs and rows."""
    return [*models(context, parameter, incomplete), *_starting(incomplete, [BBC_TOPICS])]


# What the options take that are declared as text, by their names; an option without one here takes free text.
BY_NAME: dict[str, Completer] = {
    "model": models, "data": rows, "held_out": paths, "check": rows, "output": paths, "png": paths,
    "template": templates, "adapter": folders, "pre": splits, "device": devices,
}  # fmt: skip


def completer(name: str, kinds: Iterable[Any]) -> Completer | None:
    """What completes the option ``name``, whose value is of one of these types; None where nothing does.

    An option that is a list of given values completes the one after its last comma.
    """
    for kind in kinds:
        (inner, *_) = get_args(kind) if get_origin(kind) is list else (None,)
        if get_origin(inner) is Literal:
            return _list_of([str(value) for value in get_args(inner)])
        if get_origin(kind) is Literal:
            return _one_of([str(value) for value in get_args(kind)])
    return BY_NAME.get(name)


def _one_of(values: list[str]) -> Completer:
    return lambda context, parameter, incomplete: _starting(incomplete, values)


def _list_of(values: list[str]) -> Completer:
    def complete(context: Context, parameter: Parameter, incomplete: str) -> Items:
        before, comma, last = incomplete.rpartition(",")
        return [
            CompletionItem(f"{before}{comma}{value}")
            for value in values
            if value.startswith(last) and value not in before.split(",")
        ]

    return complete


def _starting(incomplete: str, names: Iterable[str]) -> Items:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class Bash(BashComplete):
    """click's completion for bash, which offers names beside files where a value may be either; click's own script
    gives names or files."""

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local response completion type value

    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD %(complete_var)s=bash_complete $1)

    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        if [[ $type == 'dir' ]]; then
            compopt -o filenames
            COMPREPLY+=($(compgen -d -- "$value"))
        elif [[ $type == 'file' ]]; then
            compopt -o filenames
            COMPREPLY+=($(compgen -f -- "$value"))
        elif [[ $type == 'plain' ]]; then
            COMPREPLY+=("$value")
        fi
    done

    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


add_completion_class(Bash)
