"""What an evaluation measures: the options of evaluate. No torch here."""

from __future__ import annotations

from pydantic import Field

from veneer.options import Options


class EvaluateOptions(Options):
    """veneer evaluate RUN"""

    data: str | None = Field(default=None, description="Other rows to measure on. Default: the run's held-out rows.")
    exact_match: bool = Field(
        default=False,
        description="Also generate an answer to each row, by base and adapter, and compare it with the right one, "
        "letter by letter; slow.",
    )
    batch_size: int = Field(default=16, ge=1, description="Rows in one pass.")
    examples: int = Field(
        default=8, ge=0, description="Keep what base and adapter answer to this many of the rows; 0: none."
    )
