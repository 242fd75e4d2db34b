"""Rows of any known shape → examples: what the model is given, and what it is to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.data.read import Row
from veneer.errors import DataError, nearest

# The shapes by the columns that make them: needed, and those that may stand beside them.
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "prompt/completion": (("prompt", "completion"), ()),
    "instruction/output": (("instruction", "output"), ("input",)),
    "text/label": (("text", "label"), ()),
    "text": (("text",), ()),
}
_ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row in the form that training and evaluation use.

    A conversation has ``messages``, of which those from number ``given`` on may be learned; a prompted text has
    ``prompt`` and ``answer``; a plain text has an ``answer`` and no prompt (None).
    """

    where: str
    messages: tuple[Message, ...] = ()
    given: int = 0
    prompt: str | None = None
    answer: str = ""


@dataclass(frozen=True)
class Examples:
    """All examples of a source, their shape's name, and the columns that the shape does not use."""

    shape: str
    items: list[Example]
    unused: list[str]


def recognise(rows: list[Row]) -> str:
    """The name of the shape that the rows have, judged by the columns of the first.

    Raises DataError, showing the columns given and what each shape needs, when none fits or several do.
    """
    columns = list(rows[0].fields)
    fitting = [name for name, (needed, _) in SHAPES.items() if set(needed) <= set(columns)]
    if "text/label" in fitting:
        fitting.remove("text")  # the smaller shape is a part of it, not another reading
    if len(fitting) == 1:
        return fitting[0]
    needs = "; ".join(f"{name} needs {' and '.join(needed)}" for name, (needed, _) in SHAPES.items())
    columns_given = f"{rows[0].where} has the columns {', '.join(columns) or '(none)'}"
    if fitting:
        raise DataError(
            f"{columns_given}, which fit several shapes: {', '.join(fitting)}. Keep the columns of one ({needs})."
        )
    wanted = {column for needed, _ in SHAPES.values() for column in needed}
    absent = wanted - set(columns)
    close = [f"{column} → {near[0]}" for column in columns if (near := nearest(column, absent, 1))]
    hint = f" Perhaps rename {', '.join(close)}." if close else ""
    raise DataError(f"{columns_given}, which fit no shape. {needs}.{hint}")


def to_examples(rows: list[Row]) -> Examples:
    """Recognise the shape and read every row by it. Raises DataError with file and line for a row that does not fit."""
    shape = recognise(rows)
    needed, optional = SHAPES[shape]
    items = []
    for row in rows:
        missing = [column for column in needed if row.fields.get(column) is None]
        if missing:
            have = ", ".join(row.fields) or "(none)"
            raise DataError(f"{row.where} has no {' and no '.join(missing)} (its columns: {have}).")
        items.append(_READ[shape](row))
    columns = dict.fromkeys(column for row in rows for column in row.fields)
    return Examples(shape, items, [column for column in columns if column not in needed + optional])


def class_of(example: Example) -> str:
    """The class of a ``text/label`` or prompted example, without the space before it."""
    return example.answer.strip()


def _conversation(row: Row) -> Example:
    return Example(row.where, messages=_messages(row, row.fields["messages"], "messages"))


def _prompted(row: Row) -> Example:
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        given = _messages(row, prompt, "prompt")
        answer = _messages(row, completion, "completion")
        return Example(row.where, messages=(*given, *answer), given=len(given))
    return Example(row.where, prompt=_text(row, "prompt"), answer=_text(row, "completion"))


def _instruction(row: Row) -> Example:
    parts = [_text(row, "instruction"), _text(row, "input") if row.fields.get("input") else ""]
    asked = "\n\n".join(part for part in parts if part)
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": _text(row, "output")})
    return Example(row.where, messages=messages)


def _labelled(row: Row) -> Example:
    label = row.fields["label"]
    if not isinstance(label, (str, int)):
        raise DataError(f"{row.where}: label is a {type(label).__name__}; a class is a name or a whole number.")
    return Example(row.where, prompt=f"{_text(row, 'text')}\n", answer=str(label))


def _plain(row: Row) -> Example:
    return Example(row.where, answer=_text(row, "text"))


_READ = {
    "messages": _conversation,
    "prompt/completion": _prompted,
    "instruction/output": _instruction,
    "text/label": _labelled,
    "text": _plain,
}


def _text(row: Row, column: str) -> str:
    value = row.fields[column]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {column} is a {type(value).__name__}, not text.")
    return value


def _messages(row: Row, value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: {column} is not a list of messages.")
    for number, message in enumerate(value, start=1):
        known = isinstance(message, dict) and {"role", "content"} <= message.keys()
        if not known or not isinstance(message["content"], str):
            raise DataError(f"{row.where}: message {number} of {column} is not an object with role and content (text).")
        if message["role"] not in _ROLES:
            close = nearest(str(message["role"]), _ROLES, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"{row.where}: message {number} of {column} has the role {message['role']!r}; roles are "
                f"{', '.join(_ROLES)}.{hint}"
            )
    return tuple(value)
