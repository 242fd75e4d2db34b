"""What the columns of well-known data sets mean: read as the shape that they are under other names, or refused by name
where they mean something that is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.data.files import Row
from veneer.errors import DataError, nearest

# What other data sets call a column, by what it means here.
_MEANT: dict[str, tuple[str, ...]] = {
    "messages": ("conversations", "conversation", "dialog", "turns"),
    "instruction": ("prompt", "question", "query", "problem", "request", "article", "document", "dialogue", "source"),
    "output": ("completion", "response", "answer", "answers", "summary", "highlights", "solution", "reply", "target"),
    "input": ("context", "passage"),
    "system": ("system_prompt",),
    "text": ("sentence", "content", "review", "headline", "tweet", "comment"),
    "label": ("labels", "class", "category", "sentiment", "topic", "intent"),
}
_SAME = {"prompt": "instruction", "completion": "output"}
# Two texts of which a label says something.
_PAIRS = ("sentence1+sentence2", "premise+hypothesis", "question1+question2")


def by_meaning(
    shape: str, needed: tuple[str, ...], optional: tuple[str, ...], first: Row, said: Mapping[str, str]
) -> dict[str, str]:
    """Name → column of a row of this ``shape``, ``said`` of it or called what other data sets call it; empty where it
    is not of the shape, and for prompt/completion and text, which are only what they are called.

    Raises DataError where several columns could be the answer, or what is asked.
    """
    if shape in ("prompt/completion", "text"):
        return {}
    found = dict(said)
    for name in needed:
        columns = [name] if name in first.fields else _meant(name, first.fields, found.values())
        if name not in found and columns:
            found[name] = _only(columns, name, needed, first)
    if not set(needed) <= found.keys():
        return {}
    for name in optional:
        columns = [name] if name in first.fields else _meant(name, first.fields, found.values())
        if name not in found and columns and columns[0] not in found.values():
            found[name] = columns[0]
    return found


def question_by_meaning(name: str, first: Row) -> str | None:
    """The column of a row without an answer that is what ``name`` means: messages, instruction or text."""
    return next(iter(_meant(name, first.fields, ())), None)


def _meant(name: str, fields: Mapping[str, Any], taken: Any) -> list[str]:
    """The columns that mean ``name`` and hold what it may be."""
    if name == "text" and (pair := next((pair for pair in _PAIRS if set(pair.split("+")) <= fields.keys()), None)):
        return [pair]
    found, synonyms = [], _MEANT.get(_SAME.get(name, name), ())
    for column in fields:
        if column.lower() in synonyms and column not in taken:
            place = _place(name, column, fields[column])
            found += [place] if place else []
    return found


def _place(name: str, column: str, value: Any) -> str:
    """Where in a column the value is that ``name`` stands for; "" where there is none."""
    if name == "messages":
        return column if isinstance(value, list) and value and isinstance(value[0], dict) else ""
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # SQuAD's answers
        return f"{column}.text.0"
    if name == "label" and isinstance(value, list):
        return f"{column}.0" if len(value) == 1 else ""
    return "" if isinstance(value, list | dict) else column


def _only(columns: list[str], name: str, needed: tuple[str, ...], first: Row) -> str:
    if len(columns) > 1:
        example = ",".join(f"{each}={columns[0] if each == name else '…'}" for each in needed)
        raise DataError(
            f"{first.where} has the columns {' and '.join(columns)}, each of which could be the {name}; say which is: "
            f"--columns {example}."
        )
    return columns[0]


def labels_column(rows: Sequence[Row]) -> tuple[str, bool] | None:
    """Where the labels of texts are that have a column of that name, and none of one label: and whether these are lists
    of which some row has several labels or none; else each row has one, which is its class."""
    first = rows[0].fields
    column = next((name for name in first if name.lower() == "labels"), None)
    if column is None or {"label", "messages", *_SAME, "instruction"} & {*first}:
        return None
    if not isinstance(first[column], list):
        return None if isinstance(first[column], dict) else (column, False)
    lists = (row.fields.get(column) for row in rows)
    several = any(isinstance(labels, list) and len(labels) != 1 for labels in lists)
    return (column, True) if several else (f"{column}.0", False)


def column_for(name: str, columns: list[str]) -> str | None:
    """The one of ``columns`` that means what ``name`` means here; else one spelt like it that does not mean another.

    >>> column_for("prompt", ["id", "promt"])
    'promt'
    """
    synonyms = _MEANT.get(_SAME.get(name, name), ())
    meant = [column for column in columns if column.lower() in synonyms]
    taken = {synonym for each in _MEANT.values() for synonym in each}
    near = [column for column in nearest(name, columns, 1) if column.lower() not in taken]
    return next(iter(meant + near), None)


def refuse_other_meanings(rows: Sequence[Row]) -> None:
    """Raises DataError for rows of a kind whose columns would be read as another's."""
    first = rows[0]
    for needed, is_it, sentence in _OTHER:
        if needed <= first.fields.keys() and (row := next((row for row in rows if is_it(row.fields)), None)):
            said = sentence(row.fields) if callable(sentence) else sentence
            raise DataError(f"{row.where} {said}")


def _translation(fields: dict[str, Any]) -> str:
    languages: list[str] = list(fields["translation"])
    one, other, *_ = (*languages, "…", "…")
    return (
        f"has a translation ({', '.join(languages)}), of which none is said to be the answer; say it: "
        f"--columns instruction=translation.{one},output=translation.{other}."
    )


_OTHER: list[tuple[set[str], Callable[[dict[str, Any]], bool], str | Callable[[dict[str, Any]], str]]] = [
    (
        {"text", "role", "parent_id"},
        lambda fields: "messages" not in fields,
        "is one message of a tree (text, role, parent_id), and would be read as plain text; join each conversation's "
        "messages into a row of messages.",
    ),
    (
        {"system", "chat"},
        lambda fields: isinstance(fields.get("chat"), str) and "messages" not in fields,
        "has a whole conversation as one text in the column chat, in which no answer is marked; write it as messages, "
        "or learn all of it as it is: --columns text=chat.",
    ),
    (
        {"translation"},
        lambda fields: isinstance(fields.get("translation"), dict) and not {"prompt", "instruction"} & fields.keys(),
        _translation,
    ),
]
