"""What was predicted, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.notebook import html_table

PREDICTION = "prediction"  # the column of labels or texts
PROBABILITY = "probability_"  # and before a label's name, that of its probability
_SHOWN = 10  # rows in a notebook


@dataclass(frozen=True)
class Prediction:
    """The likeliest label, and each label's probability (they add up to 1); all ``labels`` above one half of a text
    that may have several, and each label's probability; a ``number``; or a generated text."""

    text: str
    probabilities: dict[str, float] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    number: float | None = None

    @property
    def columns(self) -> dict[str, str | float | list[str]]:
        """As the columns of a row."""
        value: str | float | list[str] = self.text if self.number is None else self.number
        value = value if self.labels is None else [*self.labels]
        return {PREDICTION: value, **{f"{PROBABILITY}{label}": p for label, p in self.probabilities.items()}}


@dataclass(frozen=True, repr=False)
class Predictions:
    """A `Prediction` a row, in the rows' order; at a prompt one line, in a notebook a table."""

    rows: list[dict[str, Any]]  # the columns of the rows that are kept
    predictions: list[Prediction]
    labels: tuple[str, ...] = ()  # that were chosen among; none: texts
    notes: tuple[str, ...] = ()  # what was cut or not used, in sentences
    output: Path | None = None  # the file that holds them, too
    reused: int = 0  # rows that an interrupted prediction had computed

    def __len__(self) -> int:
        return len(self.predictions)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)

    def __getitem__(self, row: int) -> Prediction:
        return self.predictions[row]

    def records(self) -> list[dict[str, Any]]:
        """The rows with the columns prediction and, where labels were chosen among, probability_LABEL."""
        return [{**row, **prediction.columns} for row, prediction in zip(self.rows, self.predictions, strict=True)]

    def to_pandas(self) -> Any:
        """The records as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame.from_records(self.records())

    def __repr__(self) -> str:
        numbers = any(each.number is not None for each in self.predictions)
        among = f"of {len(self.labels)} labels" if self.labels else "numbers" if numbers else "texts"
        return f"Predictions({len(self)} rows, {among}{f', in {self.output}' if self.output else ''})"

    def _repr_html_(self) -> str:
        records = self.records()[:_SHOWN]
        header = list(dict.fromkeys(name for record in records for name in record))
        lines = [[record.get(name, "") for name in header] for record in records]
        return html_table(header, lines, f"{len(self)} rows" + (f", the first {_SHOWN}" if len(self) > _SHOWN else ""))
