"""What Veneer prints to a terminal: texts of rows, files and models are shown, and never act on it."""

from __future__ import annotations

import re

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

# ESC begins the sequences by which a text moves the cursor, renames the window or writes the clipboard; a carriage
# return writes over the line; a mark of direction shows a text in another order than it has.
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """``text`` with every control character but tab and newline written out, as "\\x1b" is.

    Example:
        >>> from veneer.terminal import harmless
        >>> print(harmless("a\\x1b[2Jb"))
        a\\x1b[2Jb
    """
    return _ACTS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def terminal(*, stderr: bool = False) -> Console:
    """A console on standard output, or standard error, that prints harmless texts."""
    console = Console(stderr=stderr)
    console.push_render_hook(_Harmless())
    return console


class _Harmless(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Written(renderable) for renderable in renderables]


class _Written:
    """A renderable whose texts are harmless; rich's own colours stay."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)
