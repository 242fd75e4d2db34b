"""Which shape rows have, and in which of their columns each part of it is: by name, by what a person says, or by what
well-known data sets call it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from veneer.data.files import Row
from veneer.data.meanings import by_meaning, column_for, labels_column, refuse_other_meanings
from veneer.data.preferences import PAIRS, PREFERENCE_SHAPES, preference_shape
from veneer.errors import DataError, did_you_mean

NUMBERS = "text/number"  # the shape of text/label, where a person says that labels are numbers
# The shapes by the columns that make them: needed, and those that may stand beside them.
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools", "functions", "system")),
    "prompt/completion": (("prompt", "completion"), ("tools", "functions")),
    "instruction/output": (("instruction", "output"), ("input", "system", "history", "tools")),
    "text/label": (("text", "label"), ()),
    "text/labels": (("text", "labels"), ()),
    NUMBERS: (("text", "label"), ()),
    **PREFERENCE_SHAPES,
    "text": (("text",), ()),
}
NAMES = tuple(dict.fromkeys(name for needed, optional in SHAPES.values() for name in (*needed, *optional)))
_PLAIN = [shape for shape in SHAPES if shape not in PREFERENCE_SHAPES and shape != NUMBERS]
Shape = Literal[
    "auto", "messages", "prompt/completion", "instruction/output", "text/label", "text/labels", "text/number",
    "chosen/rejected", "prompt/completion/label", "text",
]  # fmt: skip
Leave = Literal["stop", "leave-out"]


class ReadOptions(Protocol):
    """The options of every verb that reads rows."""

    @property
    def columns(self) -> dict[str, str]: ...
    @property
    def shape(self) -> str: ...


@dataclass(frozen=True)
class Reading:
    """How rows are read, where their own columns do not say it.

    ``columns``: a name of `NAMES` → the column that is meant: ``question``; of an object in it ``answers.text.0``; or
    several, joined by a line break, ``title+body``. ``asked``: whether a person said so of these very rows; else it is
    how a run's rows were read, of which other rows follow what they have. ``numbers``: whether labels are numbers.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    shape: str = "auto"
    asked: bool = True
    numbers: bool = False

    @classmethod
    def of(cls, options: ReadOptions, like: Reading | None = None) -> Reading:
        """As ``options`` say; where they say nothing, as rows were read before, ``like`` these."""
        if options.columns or options.shape != "auto":
            return cls(options.columns, options.shape)
        return like or cls()


@dataclass(frozen=True)
class Recognised:
    """The shape of rows, and the column that each of its names is read from."""

    shape: str
    columns: dict[str, str]
    by_meaning: bool = False  # whether no one said so, and the columns have other names

    @property
    def renamed(self) -> dict[str, str]:
        """Name → column, where they differ."""
        return {name: column for name, column in self.columns.items() if name != column}

    def named(self, row: Row) -> Row:
        """The row with what the shape reads, under the shape's names."""
        fields = {name: value_at(row.fields, column) for name, column in self.columns.items()}
        return Row(fields, row.where)

    def unused(self, columns: Iterable[str]) -> list[str]:
        """Those of ``columns`` that nothing is read from."""
        read = {part for column in self.columns.values() for part in (column, *_parts(column))}
        return [column for column in columns if column not in read]

    def note(self) -> str:
        """What a person should know of columns that were read as others."""
        if not self.by_meaning:
            return ""
        return f"Read as {self.shape}: {_arrows(self.renamed)}; --columns reads them otherwise."


def recognise(rows: Sequence[Row], reading: Reading | None = None) -> Recognised:
    """The shape that the rows have, judged by the columns of the first.

    Raises DataError, showing the columns given and what each shape needs, when none fits or several do, and for rows
    whose columns fit one and mean something else.
    """
    reading = reading or Reading()
    if reading.numbers or reading.shape == NUMBERS:
        shape = "text/label" if reading.shape == NUMBERS else reading.shape
        labelled = recognise(rows, replace(reading, shape=shape, numbers=False))
        return replace(labelled, shape=NUMBERS) if labelled.shape == "text/label" else labelled
    first = rows[0]
    said = said_columns(first, reading)
    if preferred := _preference(rows, said, reading):
        return preferred
    if not said and (reading.shape == "auto" or not reading.asked):
        refuse_other_meanings(rows)
    if reading.shape in ("auto", "text/label") and (labels := labels_column(rows)):
        column, several = labels
        if several:
            reading, said = replace(reading, shape="text/labels"), {"labels": column, **said}
        elif "text" in first.fields and not said:
            return Recognised("text/label", {"text": "text", "label": column}, by_meaning=True)
    shapes = _possible(said, reading, first)
    of_lists = reading.shape == "text/labels" or "labels" in said
    columns = {**{name: name for name in first.fields if name in NAMES}, **said}
    fitting = [
        shape for shape in shapes
        if set(SHAPES[shape][0]) <= columns.keys() and (of_lists or shape != "text/labels")
    ]  # fmt: skip
    fitting = _without_parts(fitting, columns, first.fields)
    if len(fitting) == 1:
        return Recognised(fitting[0], _of_shape(fitting[0], columns))
    if fitting:
        raise DataError(
            f"{_columns_of(first)}, which fit several shapes: {', '.join(fitting)}. Say which: --shape {fitting[0]}."
        )
    for shape in shapes:
        needed, optional = SHAPES[shape]
        if shape == "text/labels" and not of_lists:
            continue
        if found := by_meaning(shape, needed, optional, first, said):
            if reading.shape == "prompt/completion" and found.keys() == {*needed}:  # as a run's rows were
                return Recognised(reading.shape, dict(zip(SHAPES[reading.shape][0], found.values(), strict=True)), True)
            return Recognised(shape, found, by_meaning=True)
    raise DataError(_refusal(first, shapes))


def _preference(rows: Sequence[Row], said: dict[str, str], reading: Reading) -> Recognised | None:
    """Rows with preferences, which come before all other shapes: as one of these they would be learned with their bad
    answers. None for other rows, and for columns or a shape that were said and make them others."""
    first = rows[0]
    if reading.shape in PREFERENCE_SHAPES and reading.asked:
        shape: str | None = reading.shape
    else:
        shape = preference_shape(rows) if reading.shape in ("auto", *PREFERENCE_SHAPES) or not reading.asked else None
        if shape is None and "chosen" in said and "rejected" in said:
            shape = PAIRS
    if shape is None or not set(said) <= {name for names in PREFERENCE_SHAPES[shape] for name in names}:
        return None
    if found := by_meaning(shape, *PREFERENCE_SHAPES[shape], first, said):
        return Recognised(shape, found, by_meaning=any(said.get(name, name) != found[name] for name in found))
    raise DataError(_refusal(first, [shape]))


def said_columns(first: Row, reading: Reading) -> dict[str, str]:
    """Name → column, of what was said. Raises DataError for a column that the first row does not have, except where it
    was said of other rows."""
    said = {}
    for name, column in reading.columns.items():
        missing = next((part for part in column.split("+") if not _has(first.fields, part)), None)
        if missing is None or column in first.fields:
            said[name] = column
        elif reading.asked:
            raise DataError(
                f"{first.where} has no column {missing!r} to read as {name} (its columns: {first.names()})."
                f"{did_you_mean(missing, first.fields)}"
            )
    return said


def value_at(fields: Mapping[str, Any], column: str) -> Any:
    """What is in ``column``, which may be a place inside an object or list, or several columns joined by a line break;
    None where there is nothing.

    >>> value_at({"answers": {"text": ["Paris"]}}, "answers.text.0")
    'Paris'
    """
    if column in fields:
        return fields[column]
    if "+" in column:
        parts = [value_at(fields, part) for part in column.split("+")]
        return "\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    value: Any = fields
    for step in column.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit():
            value = value[int(step)] if int(step) < len(value) else None
        else:
            return None
    return value


def check_columns(columns: Any) -> Any:
    """``columns`` of an option, if its names are those of shapes. Raises ValueError for another name."""
    if not isinstance(columns, dict):
        return columns
    for name, column in columns.items():
        if name not in NAMES:
            turned = f" Is {column}={name} meant?" if column in NAMES else did_you_mean(str(name), NAMES)
            raise ValueError(f"columns names {name!r}, which is none of {', '.join(NAMES)}.{turned}")
    return columns


def _parts(column: str) -> list[str]:
    return [part.split(".")[0] for part in column.split("+")]


def _has(fields: Mapping[str, Any], column: str) -> bool:
    return column in fields or column.split(".")[0] in fields


def _possible(said: Collection[str], reading: Reading, first: Row) -> list[str]:
    """The shapes that the rows may have, by what was said of them."""
    if reading.shape != "auto":
        needed = SHAPES[reading.shape][0]
        if reading.asked or all(name in said or name in first.fields for name in needed):
            return [reading.shape]
    shapes = [shape for shape in _PLAIN if set(said) <= {name for names in SHAPES[shape] for name in names}]
    if not shapes:
        raise DataError(f"columns names {', '.join(said)}, which no shape has together. {_needs(SHAPES)}.")
    return shapes


def _without_parts(fitting: list[str], columns: Mapping[str, str], fields: Mapping[str, Any]) -> list[str]:
    """The shapes less plain text where that is a part of another one's, or the same row written out."""
    if any(name in columns for name in ("label", "labels")):
        fitting = [shape for shape in fitting if shape != "text"] or fitting
        if len(fitting) == 1:
            return fitting
    others = [shape for shape in fitting if shape != "text"]
    if len(others) == 1 < len(fitting):
        text = value_at(fields, columns["text"])
        inside = [value_at(fields, columns[name]) for name in SHAPES[others[0]][0]]
        if all(isinstance(part, str) and str(part).strip() in str(text) for part in inside):
            return others
    return fitting


def _of_shape(shape: str, columns: dict[str, str]) -> dict[str, str]:
    needed, optional = SHAPES[shape]
    return {name: column for name, column in columns.items() if name in (*needed, *optional)}


def _columns_of(row: Row) -> str:
    return f"{row.where} has the columns {row.names()}"


def _needs(shapes: Iterable[str]) -> str:
    return "; ".join(f"{shape} needs {' and '.join(SHAPES[shape][0])}" for shape in shapes)


def _arrows(renamed: Mapping[str, str]) -> str:
    return ", ".join(f"{column} → {name}" for name, column in renamed.items())


def _refusal(first: Row, shapes: list[str]) -> str:
    what = "no shape" if len(shapes) == len(_PLAIN) else f"not the shape {' or '.join(shapes)}"
    renames = _hint(first, shapes)
    hint = ",".join(f"{name}={column}" for name, column in renames.items())
    return f"{_columns_of(first)}, which fit {what}. {_needs(SHAPES if what == 'no shape' else shapes)}." + (
        f" Perhaps --columns {hint}." if hint else ""
    )


def _hint(first: Row, shapes: list[str]) -> dict[str, str]:
    """Name → column as spelt like it, so that the columns make a shape; of the shape that most of them take part in."""
    best: dict[str, str] = {}
    most = 0
    for shape in shapes:
        needed, optional = SHAPES[shape]
        renames: dict[str, str] = {}
        for name in needed:
            left = [
                column for column, value in first.fields.items()
                if column not in renames.values() and column not in (*needed, *optional)
                and isinstance(value, list | dict) == (name == "messages")
            ]  # fmt: skip
            if name not in first.fields and (like := column_for(name, left)):
                renames[name] = like
        own = {*renames, *first.fields} & {*needed, *optional}
        if set(needed) <= own and len(own) > most:
            best, most = renames, len(own)
    return best
