"""Rows that cannot be used: the first one is an error, or all are left out and counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from veneer.errors import DataError

_SHOWN = 10  # reasons, and places of each


@dataclass(frozen=True)
class BadRow:
    """Where a row stands that cannot be used, and the sentence that says why, which begins with the place."""

    where: str
    sentence: str

    @property
    def reason(self) -> str:
        return self.sentence.removeprefix(self.where).lstrip(": ")


@dataclass
class BadRows:
    """The bad rows of a source, in their order."""

    rows: list[BadRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, where: str, sentence: str) -> None:
        self.rows.append(BadRow(where, sentence))

    @contextmanager
    def instead_of_an_error(self, where: str) -> Iterator[None]:
        """What is refused inside is a bad row."""
        try:
            yield
        except DataError as error:
            self.add(where, str(error))

    def refuse(self) -> None:
        """Raises DataError of the first one, with the number of the others, if there is any."""
        if len(self.rows) > 1:
            others = len(self.rows) - 1
            raise DataError(
                f"{self.rows[0].sentence} {others:,} more {'row is' if others == 1 else 'rows are'} bad: veneer "
                f"inspect lists them, bad_rows: leave-out goes on without them."
            )
        if self.rows:
            raise DataError(self.rows[0].sentence)

    def refuse_all(self, total: int) -> None:
        """Raises DataError where all rows are bad."""
        if len(self.rows) == total:
            self.refuse()

    def sentences(self) -> list[str]:
        """What was left out, and why, with the first places."""
        if not self.rows:
            return []
        count = len(self.rows)
        return [f"{count:,} bad {'row' if count == 1 else 'rows'} left out:", *self.lines()]

    def lines(self) -> list[str]:
        """A line a reason, the most frequent first: how often, an example of it, and where."""
        kinds = Counter(_kind(row.reason) for row in self.rows)
        lines = []
        for kind, count in kinds.most_common(_SHOWN):
            rows = [row for row in self.rows if _kind(row.reason) == kind]
            places = ", ".join(row.where for row in rows[:_SHOWN]) + (", …" if count > _SHOWN else "")
            lines.append(f"  {count:,} × {rows[0].reason} ({places})")
        if len(kinds) > _SHOWN:
            lines.append(f"  … and {len(kinds) - _SHOWN} more reasons")
        return lines

    def as_json(self) -> dict[str, object]:
        """Their number, and the first hundred."""
        shown = [{"where": row.where, "reason": row.reason} for row in self.rows[:100]]
        return {"count": len(self.rows), "rows": shown}


def _kind(reason: str) -> str:
    """A reason without what differs from row to row: numbers, and what is quoted."""
    return re.sub(r"'[^']*'|\d+", "…", reason)
