"""Which shape rows have, by their columns; and what is said of columns that fit none, or that mean something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from veneer.data.preferences import PREFERENCE_SHAPES, preference_shape
from veneer.data.read import Row
from veneer.errors import DataError, nearest

# The shapes by the columns that make them: needed, and those that may stand beside them.
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools", "functions", "system")),
    "prompt/completion": (("prompt", "completion"), ("tools", "functions")),
    "instruction/output": (("instruction", "output"), ("input", "system", "history")),
    "text/label": (("text", "label"), ()),
    **PREFERENCE_SHAPES,
    "text": (("text",), ()),
}
# What other data sets call a column, by what it means here.
_MEANT: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "article", "document", "dialogue", "source", "problem", "request"),
    "completion": ("answer", "response", "output", "summary", "highlights", "target", "solution", "reply", "answers"),
    "messages": ("conversation", "conversations", "dialog", "chat"),
    "output": ("response", "answer", "completion"),
    "input": ("context",),
    "text": ("sentence", "content", "document", "review", "headline", "tweet"),
    "label": ("labels", "class", "category", "sentiment", "topic", "intent"),
}


def recognise(rows: Sequence[Row]) -> str:
    """The name of the shape that the rows have, judged by the columns of the first.

    Raises DataError, showing the columns given and what each shape needs, when none fits or several do, and for rows
    whose columns fit one and mean something else.
    """
    if shape := preference_shape(rows):
        return shape  # its columns may make others, too, which would learn bad answers
    _refuse_other_meanings(rows)
    columns = list(rows[0].fields)
    plain = {name: needed for name, (needed, _) in SHAPES.items() if name not in PREFERENCE_SHAPES}
    fitting = [name for name, needed in plain.items() if set(needed) <= set(columns)]
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
    renamed = _renames(rows[0].fields)
    hint = f" Perhaps rename {', '.join(f'{old} → {new}' for old, new in renamed.items())}." if renamed else ""
    raise DataError(f"{columns_given}, which fit no shape. {needs}.{hint}")


def _renames(fields: dict[str, Any]) -> dict[str, str]:
    """Column → name, so that the columns make one shape: by what they mean, then by how they are spelt; of the shape
    that most of them take part in. None where no shape would be complete. A list is a conversation, or nothing."""
    columns = list(fields)
    best: dict[str, str] = {}
    most = 0
    for needed, optional in (columns_of for shape, columns_of in SHAPES.items() if shape not in PREFERENCE_SHAPES):
        renames: dict[str, str] = {}
        for name in (*needed, *optional):
            left = [
                column for column, value in fields.items()
                if column not in renames and column not in (*needed, *optional)
                and isinstance(value, list | dict) == (name == "messages")
            ]  # fmt: skip
            if name not in columns and (like := column_for(name, left, spelt=name in needed)):
                renames[like] = name
        names = {renames.get(column, column) for column in columns}
        own = names & {*needed, *optional}
        if set(needed) <= names and len(own) > most:
            best, most = renames, len(own)
    return best


def column_for(name: str, columns: list[str], *, spelt: bool = True) -> str | None:
    """The one of ``columns`` that means what ``name`` means here; else, where it is ``spelt`` so, one spelt like it.

    >>> column_for("prompt", ["id", "question"])
    'question'
    """
    meant = [column for synonym in _MEANT.get(name, ()) for column in columns if column.lower() == synonym]
    near = nearest(name, columns, 1) if spelt else []
    taken = {synonym for synonyms in _MEANT.values() for synonym in synonyms}
    return next(iter(meant), next((column for column in near if column.lower() not in taken), None))


def _refuse_other_meanings(rows: Sequence[Row]) -> None:
    """Raises DataError for rows of a kind whose columns would be read as another's."""
    first = rows[0]
    for needed, is_it, sentence in _OTHER:
        if needed <= first.fields.keys() and (row := next((row for row in rows if is_it(row.fields)), None)):
            raise DataError(f"{row.where} {sentence}")


_OTHER: list[tuple[set[str], Callable[[dict[str, Any]], bool], str]] = [
    (
        {"conversations"},
        lambda fields: "messages" not in fields and "from" in str(fields.get("conversations"))[:200],
        "is in ShareGPT's form; write it as messages: conversations → messages, from → role (human → user, gpt → "
        "assistant), value → content.",
    ),
    (
        {"text", "labels"},
        lambda fields: "label" not in fields and isinstance(fields.get("labels"), list),
        "has a list of labels: a text of several classes, which Veneer does not train on; give one class a row in a "
        "column label.",
    ),
    (
        {"text", "labels"},
        lambda fields: "label" not in fields,
        "has text and labels, and would be read as plain text without its label; rename labels → label.",
    ),
    (
        {"text", "role", "parent_id"},
        lambda fields: "messages" not in fields,
        "is one message of a tree (text, role, parent_id), and would be read as plain text; join each conversation's "
        "messages into a row of messages.",
    ),
]
