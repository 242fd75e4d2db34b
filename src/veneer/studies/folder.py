"""A study's folder: what is in it, and how it is read and written.

studies/rank/  runs.csv  study.json  summary.md  rank.png
studies/runs/  a run folder for each training, shared by the studies beside each other

runs.csv has a row for each run: ``run``, the key of all that defines it, and the columns that study.json explains. A
number that does not apply is empty. Shares are between 0 and 1, memory is in bytes, time in seconds.

study.json is one object:

    name, title       "rank", and its question
    model, data       what was studied
    options           every option of ``veneer study``, ray and output left out
    finished          whether all rows exist
    columns           column of runs.csv → what it means
    runs              the keys (column run) of the rows that these options made; the file may hold others
    findings          a paragraph of plain text
    plots             names of the PNG files beside it
    environment       versions, platform, threads, as in a run's environment.json
    date              of the last run, YYYY-MM-DD

summary.md holds the findings and the plots for a reader without tools.
"""

from __future__ import annotations

import csv
import io
import json
from datetime import date
from pathlib import Path
from typing import Any

from veneer.environment import environment
from veneer.errors import DataError
from veneer.files import write_text
from veneer.reporting.table import CSV_NAME, JSON_NAME, read_table
from veneer.studies.study import MEASURED, Row, Study
from veneer.threads import wanted

SUMMARY_NAME = "summary.md"
ADDED = "largest_class"  # a column that the first studies did not have
_MOST, _LONGEST = 20, 40  # columns of another file that a refusal names, and letters of each


def columns_of(study: Study | type[Study]) -> dict[str, str]:
    return {"run": "key of all that defines the run", **study.columns, **MEASURED}


def read_study_rows(folder: Path, study: Study | type[Study]) -> list[Row]:
    """The rows of a study, numbers as numbers; those of a version without `ADDED` have None there. Raises DataError for
    a file with other columns than the study's."""
    path = folder / CSV_NAME
    head, rows = read_table(path)
    columns = list(columns_of(study))
    if head == [name for name in columns if name != ADDED]:
        return [{name: row.get(name) for name in columns} for row in rows]
    if head and head != columns:
        given = ", ".join(name[:_LONGEST] for name in head[:_MOST])
        raise DataError(
            f"{path} has the columns {given}, not those of the study {study.name}: it is another study's, or "
            f"of another version. Give another output, or move it away."
        )
    return rows


def write_study_rows(folder: Path, study: Study | type[Study], rows: list[Row]) -> None:
    """All rows, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(study), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / CSV_NAME, text.getvalue())


def write_study(folder: Path, study: Study, rows: list[Row], findings: str, plots: list[str]) -> None:
    """study.json, and summary.md where there are findings."""
    options = study.options.model_dump(exclude={"ray", "output"})
    said: dict[str, Any] = {
        "name": study.name, "title": study.title, "model": options["model"], "data": options["data"],
        "options": options, "finished": bool(findings), "columns": columns_of(study),
        "runs": list(dict.fromkeys(row["run"] for row in rows)),
        "findings": findings, "plots": plots, "environment": environment(wanted()), "date": date.today().isoformat(),
    }  # fmt: skip
    write_text(folder / JSON_NAME, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    if findings:
        pictures = "\n".join(f"![{name}]({name})" for name in plots)
        write_text(folder / SUMMARY_NAME, f"# {study.title}\n\n{findings}\n\n{pictures}\n")
