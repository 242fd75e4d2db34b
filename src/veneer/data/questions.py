"""Rows without answers → examples: what a model is to answer, in the shapes of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.data.bad import BadRows
from veneer.data.columns import Reading, said_columns, value_at
from veneer.data.files import Row
from veneer.data.formats import Example, to_examples
from veneer.data.meanings import column_for, question_by_meaning
from veneer.data.messages import FROM_ASSISTANT
from veneer.errors import DataError

_HELD = "a"  # in an answer's place: prompts are rendered as those of rows with answers
# The column that makes a question → the columns of training's shapes that hold its answer.
ASKED = {"messages": (), "prompt": ("completion",), "instruction": ("output",), "text": ("label", "labels")}
_ANSWERS = ("completion", "output", "label", "labels")
_OF_LABELS = ("text/label", "text/labels", "text/number")
_HINTED = ("messages", "instruction", "text")
# What else belongs to a question.
_BESIDE = {
    "messages": ("tools", "functions", "system"), "prompt": ("tools", "functions"),
    "instruction": ("input", "system", "history", "tools"),
}  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """An example a row, its answer a placeholder; and what the rows have of answers, which is not read."""

    column: str  # that they are read from
    items: Sequence[Example]
    answers: str = ""  # in words; empty: none
    rows: list[Row] = field(default_factory=list)  # of each example
    note: str = ""  # what a person should know of the columns

    def only(self, items: Sequence[Example]) -> Questions:
        """Those of these ``items``, which are some of its own."""
        places = {item.where for item in items}
        return replace(self, items=items, rows=[row for row in self.rows if row.where in places])


def to_questions(
    rows: list[Row], *, labelled: bool = False, reading: Reading | None = None, bad: BadRows | None = None
) -> Questions:  # fmt: skip
    """Read every row's question: of its messages, prompt, instruction (and input) or text; a row's answer, if it has
    one, plays no part.

    ``labelled``: a text is what a label belongs to, as in rows of text and label, which have a line break between them;
    else a text that goes on. ``reading``: as the rows were read that the model was trained on. Rows without a question
    go to ``bad``; without it, raises DataError with file and line for one without the question that the first row has.

    >>> to_questions([Row({"prompt": "1 + 1 ="}, "rows.jsonl:1")]).items[0].prompt
    '1 + 1 ='
    """
    reading, first = reading or Reading(), rows[0]
    said = said_columns(first, _of_questions(reading))
    name, columns = _asked(first, said)
    by_meaning = name == "instruction" and columns.keys() == {name} and "instruction" not in {*said, *first.fields}
    if by_meaning and reading.shape == "prompt/completion":
        name, columns = "prompt", {"prompt": columns[name]}  # as the run's rows were
    named = any(name in columns for name in ("label", "labels") for columns in (first.fields, reading.columns))
    labelled = labelled or named or reading.shape in _OF_LABELS
    held, whole, own = [], [], BadRows()
    for row in rows:
        with own.instead_of_an_error(row.where):
            (example,) = to_examples([_with_placeholder(row, name, columns, labelled)], _AS_THEY_ARE).items
            held.append(example)
            whole.append(row)
    if bad is None or not held:
        own.refuse()
    if bad is not None:
        bad.rows += own.rows
    renamed = {here: column for here, column in columns.items() if here != column}
    note = f"Read as {name}: {', '.join(f'{column} → {here}' for here, column in renamed.items())}." if renamed else ""
    return Questions(columns[name], held, _answers(whole, name, columns), whole, note)


_AS_THEY_ARE = Reading()


def with_answer(question: Example, answer: str) -> Example:
    """The example with this answer to its question, which is all that it would be trained on."""
    if not question.messages:
        return replace(question, answer=answer)
    *before, last = question.messages
    return replace(question, messages=(*before, {**last, "content": answer.strip()}), given=len(before))


def _of_questions(reading: Reading) -> Reading:
    """What was said of columns of questions; those of answers may be missing."""
    columns = {name: column for name, column in reading.columns.items() if name not in _ANSWERS}
    return Reading(columns, asked=reading.asked)


def _asked(row: Row, said: dict[str, str]) -> tuple[str, dict[str, str]]:
    """What is asked, and name → column of all that belongs to the question."""
    columns = list(row.fields)
    asked = [name for name in ASKED if name in said] or [name for name in ASKED if name in columns]
    place = said.get(asked[0], asked[0]) if asked else ""
    if not asked:
        meant = ((name, question_by_meaning(name, row)) for name in _HINTED)
        asked, place = next((([name], column) for name, column in meant if column), ([], ""))
    if len(asked) == 1:
        beside = {name: said.get(name, name) for name in _BESIDE.get(asked[0], ()) if name in said or name in columns}
        others = {name: column for name in _BESIDE.get(asked[0], ()) if (column := question_by_meaning(name, row))}
        return asked[0], {asked[0]: place, **others, **beside}
    has = f"{row.where} has the columns {', '.join(columns) or '(none)'}"
    names = f"{', '.join(list(ASKED)[:-1])} or text"
    if asked:
        raise DataError(f"{has}, of which {' and '.join(asked)} can each be what is asked. Keep one of them.")
    like = next(((column, name) for name in ASKED if (column := column_for(name, columns))), None)
    hint = f" Perhaps --columns {like[1]}={like[0]}." if like else ""
    raise DataError(f"{has}, and none of them is what is asked: {names}.{hint}")


def _with_placeholder(row: Row, name: str, columns: dict[str, str], labelled: bool) -> Row:
    """The row in a shape of training."""
    value = value_at(row.fields, columns[name])
    if value is None:
        raise DataError(f"{row.where} has no {columns[name]} (its columns: {row.names()}).")
    reply = {"role": "assistant", "content": _HELD}
    found = {beside: value_at(row.fields, column) for beside, column in columns.items() if beside != name}
    beside = {name: inner for name, inner in found.items() if inner is not None}
    if name == "messages":
        return Row({"messages": _answered(row, value, reply), **beside}, row.where)
    if name == "prompt":
        return Row({"prompt": value, "completion": [reply] if isinstance(value, list) else _HELD, **beside}, row.where)
    if name == "instruction":
        return Row({"instruction": value, "output": _HELD, **beside}, row.where)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: text is a {type(value).__name__}, not text.")
    return Row({"text": value, "label": _HELD} if labelled else {"prompt": value, "completion": _HELD}, row.where)


def _answered(row: Row, messages: Any, reply: dict[str, str]) -> Any:
    """A conversation that ends in ``reply``, in the place of the answer that it ends in, if it does."""
    if not isinstance(messages, list) or not messages:
        return messages  # refused with the others that are no conversation
    last = messages[-1]
    before = messages[:-1] if _is_answer(last) else messages
    if not before:
        raise DataError(f"{row.where}: messages holds an answer, and no message before it to answer.")
    return [*before, reply]


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and (message.get("role") == "assistant" or message.get("from") in FROM_ASSISTANT)


def _answers(rows: list[Row], name: str, columns: dict[str, str]) -> str:
    if name == "messages":
        ended = [_is_answer(value_at(row.fields, columns[name])[-1]) for row in rows]
        return "the assistant's last message" if any(ended) else ""
    there = [name for name in ASKED[name] if any(row.fields.get(name) is not None for row in rows)]
    return f"the column {there[0]}" if there else ""
