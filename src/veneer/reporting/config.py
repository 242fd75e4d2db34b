"""Where a report goes: its options. No torch here."""

from __future__ import annotations

from pydantic import Field

from veneer.options import Options


class ReportOptions(Options):
    """veneer report RUN…|STUDY"""

    output: str | None = Field(
        default=None,
        description="The page's file. Default: report.html in the folder itself; for several runs comparison.html "
        "beside the first.",
    )
