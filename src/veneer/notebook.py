"""What objects show in a notebook: a table in HTML, everything in it escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


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
