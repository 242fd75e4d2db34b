"""The page of a study: a folder with study.json, runs.csv and plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from veneer.errors import DataError
from veneer.reporting.charts import Chart, Series, X, shown
from veneer.reporting.page import picture, render

STUDY_NAME, ROWS_NAME = "study.json", "runs.csv"
_KEY, _SEED = "run", "seed"  # columns: what names a run; what runs are repeated over
_FEW = 20  # values of x that stand as categories, side by side, however far apart
Row = dict[str, Any]


def study_page(path: Path) -> str:
    """The HTML of the study in ``path``. Raises DataError when its study.json or runs.csv is damaged."""
    study, (head, rows) = _study(path), _rows(path / ROWS_NAME)
    columns = study.get("columns") or {}
    charts = study_charts(head, rows, columns)
    finished = bool(study.get("finished"))
    plots = list(study.get("plots") or [])
    known = [name for name in plots if Path(name).name == name and name.endswith(".png") and (path / name).is_file()]
    lost = [name for name in plots if name not in known]
    about = " on ".join(str(study[name]) for name in ("model", "data") if study.get(name))
    name = study.get("name") or path.resolve().name
    return render(
        "study.html", charts, name=name, title=study.get("title") or name, finished=finished,
        state=" · ".join(filter(None, [about, study.get("date"), "" if finished else "not finished"])),
        notes=[f"The plot {name} is not in the folder." for name in lost],
        findings=study.get("findings") or "Nothing yet: not all of its runs are done.",
        pictures=[(name, picture(path / name)) for name in known], file=ROWS_NAME, head=head,
        rows=[[shown(row[name]) for name in head] for row in rows], columns=list(columns.items()),
        options=list((study.get("options") or {}).items()), machine=list((study.get("environment") or {}).items()),
    )  # fmt: skip


def study_charts(head: list[str], rows: list[Row], meanings: dict[str, str]) -> list[Chart]:
    """A chart for each column that was measured.

    The columns before the seed say what was compared: the one of most values is x, and of the others those that make
    a difference between rows of equal x name the series. Each point is the mean over the seeds.
    """
    if _SEED not in head:
        return []
    place = head.index(_SEED)
    compared = [name for name in head[:place] if name != _KEY and not _is_json(rows, name)]
    varied = [name for name in compared if len({row[name] for row in rows}) > 1]
    if not varied:
        return []
    x = max(varied, key=lambda name: len({row[name] for row in rows}))  # of equal ones the first
    parts = _series_columns(x, [name for name in varied if name != x], rows)
    charts = []
    for name in head[place + 1 :]:
        measured = [row for row in rows if _is_number(row[name]) and row[x] is not None]
        if len({row[name] for row in measured}) < 2:
            continue
        y = meanings.get(name, "").partition(";")[0] or name
        kind: Literal["line", "scatter"] = "line" if all(_is_number(row[x]) for row in measured) else "scatter"
        groups: dict[str, list[Row]] = {}
        for row in measured:
            groups.setdefault(", ".join(str(row[part]) for part in parts) or name, []).append(row)
        order = _order(measured, x)
        series = [Series(of, _points(its, x, name, order, mean=True)) for of, its in groups.items()]
        if any(len(one.points) < len(its) for one, its in zip(series, groups.values(), strict=True)):
            series += [
                Series(f"{of}, each", _points(its, x, name, order, mean=False), mean=of) for of, its in groups.items()
            ]
        note = "Means over the seeds; the small marks are the seeds." if len(series) > len(groups) else ""
        charts.append(Chart(_identifier(name), name, x, y, tuple(series), kind, note))
    return charts


def _series_columns(x: str, others: list[str], rows: list[Row]) -> list[str]:
    chosen: list[str] = []
    for name in others:
        seen: dict[tuple[Any, ...], set[Any]] = {}
        for row in rows:
            seen.setdefault((row[x], *(row[part] for part in chosen)), set()).add(row[name])
        if any(len(values) > 1 for values in seen.values()):
            chosen.append(name)
    return chosen


def _order(rows: list[Row], x: str) -> list[Any]:
    values = list(dict.fromkeys(row[x] for row in rows))
    return sorted(values) if all(map(_is_number, values)) else values


def _points(rows: list[Row], x: str, y: str, order: list[Any], *, mean: bool) -> list[tuple[X, float]]:
    as_text = len(order) <= _FEW or not all(map(_is_number, order))
    found: dict[Any, list[float]] = {}
    for row in rows:
        found.setdefault(row[x], []).append(row[y])
    return [
        (shown(at) if as_text else at, value)
        for at in order
        if at in found
        for value in ([fmean(found[at])] if mean else found[at])
    ]


def _identifier(name: str) -> str:
    return "column-" + "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")


def _is_json(rows: Iterable[Row], name: str) -> bool:
    return any(isinstance(row[name], str) and row[name][:1] in ("{", "[") for row in rows)


def _study(path: Path) -> dict[str, Any]:
    file = path / STUDY_NAME
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{file} is not a study's: it holds no JSON object.")
    return found


def _rows(file: Path) -> tuple[list[str], list[Row]]:
    """The columns in order, and each row; numbers as numbers, empty ones as None."""
    if not file.is_file():
        return [], []
    with file.open(encoding="utf-8", newline="") as opened:
        reader = csv.DictReader(opened)
        rows = list(reader)
    head = list(reader.fieldnames or [])
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"{file}: row {number} has not the {len(head)} columns of the first line.")
    return head, [{name: _value(text) for name, text in row.items()} for row in rows]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None
