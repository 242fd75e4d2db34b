"""The page of a study: a folder with study.json, runs.csv and plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from veneer.documents import read_json
from veneer.errors import DataError
from veneer.reporting.charts import Chart, Series, X, displayed
from veneer.reporting.page import picture, render
from veneer.reporting.table import CSV_NAME, JSON_NAME, KEY, read_table
from veneer.runs.records import StudyRecord, checked

_SEED = "seed"  # the column that runs are repeated over
_GIVEN = "largest_class"  # a column that says what the rows are, and nothing of a run
_FEW = 20  # values of x that stand as categories, side by side, however far apart
_MOST = 40  # values of x that a reader can distinguish
_LONGEST = 60  # letters of a value in the table
Row = dict[str, Any]


def study_page(path: Path) -> str:
    """The HTML of the study in ``path``. Raises DataError when its study.json or runs.csv is damaged."""
    study, (head, rows) = read_study(path), read_table(path / CSV_NAME)
    columns = study.get("columns", {})
    there, runs = len(rows), study.get("runs")
    rows = [row for row in rows if runs is None or row.get(KEY) in runs]  # the file may hold others, too
    charts = study_charts(head, rows, columns)
    finished = study.get("finished", False)
    plots = study.get("plots", [])
    known = [name for name in plots if Path(name).name == name and name.endswith(".png") and (path / name).is_file()]
    lost = [name for name in plots if name not in known]
    notes = [f"The plot {name} is not in the folder." for name in lost]
    if there > len(rows):
        notes.append(f"{there - len(rows)} rows of {CSV_NAME} are of other options, and left out.")
    about = " on ".join(filter(None, [study.get("model"), study.get("data")]))
    name = study.get("name") or path.resolve().name
    return render(
        "study.html", charts, name=name, title=study.get("title") or name, finished=finished,
        state=" · ".join(filter(None, [about, study.get("date"), "" if finished else "not finished"])),
        notes=notes,
        findings=study.get("findings") or "Nothing yet: not all of its runs are done.",
        pictures=[(name, picture(path / name)) for name in known], file=CSV_NAME, head=head,
        rows=[[_cell(row[name]) for name in head] for row in rows], columns=list(columns.items()),
        options=list(study.get("options", {}).items()), machine=list(study.get("environment", {}).items()),
    )  # fmt: skip


def study_charts(head: list[str], rows: list[Row], meanings: dict[str, str]) -> list[Chart]:
    """A chart for each column that was measured.

    The columns of names and whole numbers before the seed say what was compared. The one with the most values among
    the rows with a measurement is x (numbers before names where two have equally many); the others that differ between
    rows of equal x name the series. Each point is the mean of the rows that remain, such as those of several seeds.
    """
    if _SEED not in head:
        return []
    compared = [name for name in head[: head.index(_SEED)] if name != KEY and _says_what(rows, name)]
    charts = []
    for name in head:
        its = [row for row in rows if _is_number(row[name])]
        if name not in (KEY, _SEED, _GIVEN, *compared) and len({row[name] for row in its}) > 1:
            chart = _chart(name, meanings.get(name, "").partition(";")[0] or name, its, compared)
            charts += [chart] if chart is not None else []
    return charts


def _chart(name: str, y: str, rows: list[Row], compared: list[str]) -> Chart | None:
    """None where nothing was compared, or too much for one axis."""
    values = {column: {row[column] for row in rows} - {None} for column in compared}
    varied = [column for column in compared if 1 < len(values[column]) <= _MOST]
    if not varied:
        return None
    numbers = {column for column in varied if all(map(_is_number, values[column]))}
    x = max(varied, key=lambda column: (len(values[column]), column in numbers))  # of equal ones the first
    rows = [row for row in rows if row[x] is not None]
    parts = _series_columns(x, [column for column in varied if column != x], rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_series_name(row, parts) or name, []).append(row)
    kind: Literal["line", "scatter"] = "line" if all(_is_number(row[x]) for row in rows) else "scatter"
    order = _order(rows, x)
    as_text = len(order) <= _FEW or kind == "scatter"
    series = [Series(of, _points(its, x, name, order, as_text, mean=True)) for of, its in groups.items()]
    if any(len(one.points) < len(its) for one, its in zip(series, groups.values(), strict=True)):
        series += [
            Series(f"{of}, each", _points(its, x, name, order, as_text, mean=False), mean=of)
            for of, its in groups.items()
        ]
    note = "Means; the small marks are the rows, as of several seeds." if len(series) > len(groups) else ""
    categories = tuple(map(displayed, order)) if as_text else ()
    return Chart(_identifier(name), name, x, y, tuple(series), kind, note, categories=categories)


def _series_name(row: Row, columns: list[str]) -> str:
    """What its values are; a number with its column's name, and nothing for none."""
    values = [(name, row[name]) for name in columns if row[name] is not None]
    return ", ".join(f"{name} {value}" if _is_number(value) else str(value) for name, value in values)


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


def _points(rows: list[Row], x: str, y: str, order: list[Any], as_text: bool, *, mean: bool) -> list[tuple[X, float]]:
    values: dict[Any, list[float]] = {}
    for row in rows:
        values.setdefault(row[x], []).append(row[y])
    return [
        (displayed(at) if as_text else at, value)
        for at in order
        if at in values
        for value in ([fmean(values[at])] if mean else values[at])
    ]


def _identifier(name: str) -> str:
    return "column-" + "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")


def _says_what(rows: Iterable[Row], name: str) -> bool:
    """Whether a column has names and whole numbers; JSON and other numbers were measured."""
    values = [row[name] for row in rows if row[name] is not None]
    return all(isinstance(value, int) or (isinstance(value, str) and value[:1] not in ("{", "[")) for value in values)


def _cell(value: Any) -> str:
    text = displayed(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def read_study(path: Path) -> StudyRecord:
    """What the study.json in ``path`` says. Raises DataError where it is damaged."""
    file = path / JSON_NAME
    try:
        return checked(read_json(file), StudyRecord)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
