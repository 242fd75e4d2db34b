"""How rows are read: the options of every verb that reads some. No torch here."""

from __future__ import annotations

from pydantic import Field, field_validator

from veneer.data.columns import Leave, Shape, check_columns
from veneer.options import Options


class RowOptions(Options):
    """What columns mean, and what becomes of rows that cannot be used."""

    columns: dict[str, str] = Field(
        default={},
        description="Columns that have other names: prompt=question,completion=answer; answers.text.0 is inside one, "
        "title+body are two.",
    )
    shape: Shape = Field(default="auto", description="Shape of the rows; auto: by their columns.")
    bad_rows: Leave = Field(
        default="stop", description="A row that cannot be used is an error, or is left out and counted."
    )

    _names_known = field_validator("columns", mode="before")(check_columns)
