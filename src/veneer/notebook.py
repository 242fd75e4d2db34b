"""What a notebook shows: an object as a table, a line that is replaced in place, a link; everything in it escaped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from rich.console import Console


def is_notebook(console: Console) -> bool:
    """Whether what ``console`` prints becomes the output of a notebook's cell, and it prints at all.

    A console can be forced to write for a notebook (``force_jupyter``) in a process that is none.
    """
    if not console.is_jupyter or console.quiet:
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return get_ipython() is not None


class LiveLine:
    """One line of a cell's output, replaced in place."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str) -> None:
        from IPython.display import display

        # Plain text as well, for Jupyter's console, which shows no HTML.
        line = {"text/plain": text, "text/html": f"<pre style='margin: 0'>{escape(text)}</pre>"}
        if self._handle is None:
            self._handle = display(line, raw=True, display_id=True)
        else:
            self._handle.update(line, raw=True)


def show_link(file: Path, before: str) -> None:
    """A link to ``file`` below a cell, with ``before`` in front of it."""
    from IPython.display import display

    # From the working directory, the notebook's own: a server has no paths above its root. Quoted, as an address is.
    address = quote(Path(os.path.relpath(file)).as_posix())
    link = f"{escape(before)}<a href='{address}' target='_blank'>{escape(str(file))}</a>"
    display({"text/plain": f"{before}{file}", "text/html": link}, raw=True)


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    """A table whose first column is text and whose others are numbers, with a sentence above it."""

    def line(tag: str, cells: Sequence[object]) -> str:
        sides = ("left", *["right"] * (len(cells) - 1))
        inner = (
            f'<{tag} style="text-align: {side}">{escape(str(cell))}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"

    body = "".join(line("td", cells) for cells in rows)
    return (
        f"<table><caption>{escape(caption)}</caption><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"
    )
