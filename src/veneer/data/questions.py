"""Rows without answers → examples: what a model is to answer, in the shapes of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.data.columns import column_for
from veneer.data.formats import Example, to_examples
from veneer.data.read import Row
from veneer.errors import DataError

_HELD = "a"  # in an answer's place: prompts are rendered as those of rows with answers
# The column that makes a question → the columns of training's shapes that hold its answer.
ASKED = {"messages": (), "prompt": ("completion",), "instruction": ("output",), "text": ("label",)}
_HINTED = ("prompt", "messages", "text", "instruction")
# What else belongs to a question.
_BESIDE = {
    "messages": ("tools", "functions", "system"), "prompt": ("tools", "functions"),
    "instruction": ("input", "system", "history"),
}  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """An example a row, its answer a placeholder; and what the rows have of answers, which is not read."""

    column: str  # that they are read from
    items: Sequence[Example]
    answers: str = ""  # in words; empty: none


def to_questions(rows: list[Row], *, labelled: bool = False) -> Questions:
    """Read every row's question: of its messages, prompt, instruction (and input) or text; a row's answer, if it has
    one, plays no part.

    ``labelled``: a text is what a label belongs to, as in rows of text and label, which have a line break between them;
    else a text that goes on. Raises DataError with file and line for a row without the question that the first row has.

    >>> to_questions([Row({"prompt": "1 + 1 ="}, "rows.jsonl:1")]).items[0].prompt
    '1 + 1 ='
    """
    column = _column(rows[0])
    labelled = labelled or "label" in rows[0].fields
    items = to_examples([_with_placeholder(row, column, labelled) for row in rows]).items
    return Questions(column, items, _answers(rows, column))


def with_answer(question: Example, answer: str) -> Example:
    """The example with this answer to its question, which is all that it would be trained on."""
    if not question.messages:
        return replace(question, answer=answer)
    *before, last = question.messages
    return replace(question, messages=(*before, {**last, "content": answer.strip()}), given=len(before))


def _column(row: Row) -> str:
    columns = list(row.fields)
    asked = [name for name in ASKED if name in columns]
    if len(asked) == 1:
        return asked[0]
    has = f"{row.where} has the columns {', '.join(columns) or '(none)'}"
    names = f"{', '.join(list(ASKED)[:-1])} or text"
    if asked:
        raise DataError(f"{has}, of which {' and '.join(asked)} can each be what is asked. Keep one of them.")
    like = next(((column, name) for name in _HINTED if (column := column_for(name, columns))), None)
    hint = f" Perhaps rename {like[0]} → {like[1]}." if like else ""
    raise DataError(f"{has}, and none of them is what is asked: {names}.{hint}")


def _with_placeholder(row: Row, column: str, labelled: bool) -> Row:
    """The row in a shape of training."""
    value = row.fields.get(column)
    if value is None:
        raise DataError(f"{row.where} has no {column} (its columns: {', '.join(row.fields) or '(none)'}).")
    reply = {"role": "assistant", "content": _HELD}
    beside = {name: row.fields[name] for name in _BESIDE.get(column, ()) if row.fields.get(name) is not None}
    if column == "messages":
        return Row({"messages": _answered(row, value, reply), **beside}, row.where)
    if column == "prompt":
        return Row({"prompt": value, "completion": [reply] if isinstance(value, list) else _HELD, **beside}, row.where)
    if column == "instruction":
        return Row({"instruction": value, "output": _HELD, **beside}, row.where)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: text is a {type(value).__name__}, not text.")
    return Row({"text": value, "label": _HELD} if labelled else {"prompt": value, "completion": _HELD}, row.where)


def _answered(row: Row, messages: Any, reply: dict[str, str]) -> Any:
    """A conversation that ends in ``reply``, in the place of the answer that it ends in, if it does."""
    if not isinstance(messages, list) or not messages:
        return messages  # refused with the others that are no conversation
    last = messages[-1]
    before = messages[:-1] if isinstance(last, dict) and last.get("role") == "assistant" else messages
    if not before:
        raise DataError(f"{row.where}: messages holds an answer, and no message before it to answer.")
    return [*before, reply]


def _answers(rows: list[Row], column: str) -> str:
    if column == "messages":
        ended = [row.fields["messages"][-1]["role"] == "assistant" for row in rows]
        return "the assistant's last message" if any(ended) else ""
    columns = [name for name in ASKED[column] if any(row.fields.get(name) is not None for row in rows)]
    return f"the column {columns[0]}" if columns else ""
