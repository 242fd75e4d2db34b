"""train and resume as Python and the command line call them: a run ends with its adapter's model card, and in a
notebook with its report and a link to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from veneer.commands.card import write_card
from veneer.commands.report import report
from veneer.notebook import is_notebook, show_link
from veneer.runs import train as runs
from veneer.runs.facts import FACTS_NAME
from veneer.runs.finish import Result
from veneer.terminal import terminal

_Run = TypeVar("_Run", bound=Callable[..., Result])


def _ending_with_its_card(run: _Run) -> _Run:
    @wraps(run)
    def wrapper(*arguments: Any, **options: Any) -> Result:
        result = run(*arguments, **options)
        console = options.get("console") or terminal()
        # The run is finished: its result is not lost for a page.
        if (result.written / FACTS_NAME).is_file():
            try:
                _say(console, write_card(result.written))
            except OSError as error:
                _say(console, f"The model card cannot be written: {error}. To have it, resume the run.")
        if is_notebook(console):
            try:
                show_link(report(result.folder), "Report: ")
            except OSError as error:
                _say(console, f"The report cannot be written: {error}")
        return result

    return cast(_Run, wrapper)


def _say(console: Any, text: str) -> None:
    if text:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


train = _ending_with_its_card(runs.train)
resume = _ending_with_its_card(runs.resume)
