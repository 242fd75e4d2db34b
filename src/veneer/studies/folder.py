"""A study's folder: what is in it, and how it is read and written.

studies/rank/  runs.csv  study.json  summary.md  rank.png
studies/runs/  a run folder for each training, shared by the studies beside each other

runs.csv has a row for each run: ``run``, the key of all that defines it, and the columns that study.json explains. A
number that does not apply is empty. Shares are between 0 and 1, memory is in bytes, time in seconds.

study.json is one object:

    name, title       "rank", and its question
    model, data       what was studied
    options           every option of ``veneer study``, ray and output left out
    finished          whether all rows are there
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
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from veneer.errors import DataError
from veneer.files import write_text
from veneer.studies.study import MEASURED, Row, Study

CSV_NAME, JSON_NAME, SUMMARY_NAME = "runs.csv", "study.json", "summary.md"


def columns_of(study: Study | type[Study]) -> dict[str, str]:
    return {"run": "key of all that defines the run", **study.columns, **MEASURED}


def read_rows(folder: Path) -> list[Row]:
    """The rows of a study, numbers as numbers. Raises DataError for a file that is none."""
    path = folder / CSV_NAME
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if any("run" not in row or None in row or None in row.values() for row in rows):
        raise DataError(f"{path} is not a study's: a row lacks columns, or the key of its run. Move it away.")
    # A key is a text, also where it looks like a number: 8082631e5967.
    return [{name: text if name == "run" else _value(text) for name, text in row.items()} for row in rows]


def write_rows(folder: Path, study: Study | type[Study], rows: list[Row]) -> None:
    """All rows, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(study), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / CSV_NAME, text.getvalue())


def write_study(folder: Path, study: Study, rows: list[Row], findings: str, plots: list[str]) -> None:
    """study.json, and summary.md where something was found."""
    options = study.options.model_dump(exclude={"ray", "output"})
    said: dict[str, Any] = {
        "name": study.name, "title": study.title, "model": options["model"], "data": options["data"],
        "options": options, "finished": bool(findings), "columns": columns_of(study),
        "runs": list(dict.fromkeys(row["run"] for row in rows)),
        "findings": findings, "plots": plots, "environment": _environment(), "date": date.today().isoformat(),
    }  # fmt: skip
    write_text(folder / JSON_NAME, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    if findings:
        pictures = "\n".join(f"![{name}]({name})" for name in plots)
        write_text(folder / SUMMARY_NAME, f"# {study.title}\n\n{findings}\n\n{pictures}\n")


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def _environment() -> dict[str, Any]:
    names = ("veneer", "torch", "transformers", "safetensors", "datasets")
    return {
        "python": platform.python_version(), "platform": platform.platform(), "processor": _processor(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        **{name: version(name) for name in names},
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
