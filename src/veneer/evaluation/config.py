"""What an evaluation measures: the options of evaluate. No torch here."""

from __future__ import annotations

from pydantic import Field, field_validator

from veneer.data.config import RowOptions
from veneer.data.metrics import check_metrics
from veneer.data.sources import named_sources
from veneer.frozen.config import UsedIn


class EvaluateOptions(UsedIn, RowOptions):
    """veneer evaluate RUN"""

    data: str | None = Field(default=None, description="Other rows to measure on. Default: the run's held-out rows.")
    _several = field_validator("data", mode="before")(named_sources)

    exact_match: bool = Field(
        default=False,
        description="Also generate an answer to each row, by base and adapter, and compare it with the right one, "
        "letter by letter; slow.",
    )
    metrics: list[str] = Field(
        default=[],
        description="Also generate an answer to each row and measure it: exact, rouge-1, rouge-2, rouge-l, bleu, or "
        "functions of your own, package.module:function; slow.",
    )
    _metrics_known = field_validator("metrics")(check_metrics)
    batch_size: int = Field(default=16, ge=1, description="Rows in one pass.")
    examples: int = Field(
        default=8, ge=0, description="Keep what base and adapter answer to this many of the rows; 0: none."
    )
