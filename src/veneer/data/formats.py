"""Rows of any known shape → examples: what the model is given, and what it is to answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.data.columns import SHAPES, recognise
from veneer.data.kept import Kept
from veneer.data.messages import Message, read_conversation, read_tools, said_in
from veneer.data.preferences import JUDGED, PAIRS, judgement, sides
from veneer.data.read import Row
from veneer.errors import DataError


@dataclass(frozen=True)
class Example:
    """One row in the form that training and evaluation use.

    A conversation has ``messages``, of which those from number ``given`` on may be learned, except the ``unlearned``
    ones, and perhaps ``tools``; a prompted text has ``prompt`` and ``answer``; a plain text has an ``answer`` and no
    prompt (None).

    A row with a preference is its chosen answer, and ``rejected`` the other one to the same question; or its one
    answer, and ``desirable`` says whether it is good.
    """

    where: str
    messages: tuple[Message, ...] = ()
    given: int = 0
    prompt: str | None = None
    answer: str = ""
    unlearned: frozenset[int] = frozenset()
    tools: tuple[dict[str, Any], ...] = ()
    rejected: Example | None = None
    desirable: bool | None = None

    @property
    def is_judged(self) -> bool:
        """Whether the row has a preference: to learn all its answers would be to learn bad ones."""
        return self.rejected is not None or self.desirable is not None

    def learned(self) -> list[bool]:
        """Whether each of the messages is an answer that is learned."""
        return [
            message["role"] == "assistant" and number >= self.given and number not in self.unlearned
            for number, message in enumerate(self.messages)
        ]

    def answers(self) -> list[int]:
        """The numbers of the messages that are answers to be learned."""
        return [number for number, learned in enumerate(self.learned()) if learned]

    def asked(self) -> tuple[Message, ...]:
        """The messages before the last answer: of a conversation without one, all."""
        return self.messages[: (self.answers() or [len(self.messages)])[-1]]

    def last_answer(self) -> str:
        """The right answer, as it is written in the row: the assistant's last one, or the completion."""
        if self.messages:
            answers = self.answers()
            return said_in(self.messages[answers[-1]]).strip() if answers else ""
        return class_of(self)


@dataclass(frozen=True)
class Examples:
    """All examples of a source, their shape's name, the columns that the shape does not use, and the places of rows
    that are left out since they have no label."""

    shape: str
    items: Sequence[Example]
    unused: list[str]
    unlabelled: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What the user should know of the rows."""
        unused = [f"Columns not used ({self.shape} rows): {', '.join(self.unused)}."] if self.unused else []
        return unused + self.left_out()

    def left_out(self) -> list[str]:
        """A sentence about rows without a label; none where each has one."""
        return [f"{counted_rows(self.unlabelled)} left out: the label is empty."] if self.unlabelled else []


def to_examples(rows: Sequence[Row]) -> Examples:
    """Recognise the shape and read every row by it.

    Raises DataError with file and line for a row that does not fit, and where no row of texts has a label.
    """
    shape = recognise(rows)
    needed, optional = SHAPES[shape]
    items, unlabelled = Kept[Example](), []
    for row in rows:
        if shape == "text/label" and "label" in row.fields and _is_blank(row.fields["label"]):
            unlabelled.append(row.where)
            continue
        missing = [column for column in needed if row.fields.get(column) is None]
        if missing:
            have = ", ".join(row.fields) or "(none)"
            raise DataError(f"{row.where} has no {' and no '.join(missing)} (its columns: {have}).")
        items.append(_READ[shape](row))
    if not len(items):
        raise DataError(f"None of the {len(rows)} rows has a label; the first is {rows[0].where}.")
    columns = dict.fromkeys(column for row in rows for column in row.fields)
    return Examples(shape, items, [column for column in columns if column not in needed + optional], unlabelled)


def counted_rows(where: list[str]) -> str:
    """Rows by their number and the first places: "2 rows (a.csv:3, a.csv:7)"."""
    shown = ", ".join(where[:3]) + (", …" if len(where) > 3 else "")
    return f"{len(where)} row{'s' if len(where) > 1 else ''} ({shown})"


def asked_text(example: Example) -> str:
    """The question: all that is before the last answer; of a plain text, the text."""
    if example.messages:
        asked = example.asked() or example.messages
        return " ".join(said_in(message) for message in asked)
    return example.prompt if example.prompt is not None else example.answer


def class_of(example: Example) -> str:
    """The class of a ``text/label`` or prompted example, without the space before it."""
    return example.answer.strip()


def _conversation(row: Row) -> Example:
    read = read_conversation(row.fields["messages"], "messages", row.where)
    return _with_system(row, Example(row.where, read.messages, unlearned=read.unlearned, tools=_tools(row)))


def _prompted(row: Row) -> Example:
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        given = read_conversation(prompt, "prompt", row.where).messages
        answer = read_conversation(completion, "completion", row.where)
        unlearned = frozenset(number + len(given) for number in answer.unlearned)
        return Example(row.where, (*given, *answer.messages), len(given), unlearned=unlearned, tools=_tools(row))
    if _tools(row):
        raise DataError(f"{row.where} has tools beside a prompt that is text; tools belong to conversations.")
    return Example(row.where, prompt=_text(row, "prompt"), answer=_text(row, "completion"))


def _pair(row: Row) -> Example:
    chosen, rejected = map(_prompted, sides(row))
    return replace(chosen, rejected=rejected)


def _judged(row: Row) -> Example:
    answer, desirable = judgement(row)
    return replace(_prompted(answer), desirable=desirable)


def _instruction(row: Row) -> Example:
    parts = [_text(row, "instruction"), _text(row, "input") if row.fields.get("input") else ""]
    turns = [*_history(row), ("\n\n".join(part for part in parts if part), _text(row, "output"))]
    pairs = ((("user", asked), ("assistant", answer)) for asked, answer in turns)
    messages = tuple({"role": role, "content": content} for pair in pairs for role, content in pair)
    return _with_system(row, Example(row.where, messages))


def _history(row: Row) -> list[tuple[str, str]]:
    """Earlier questions and answers, which LLaMA-Factory's rows have as pairs."""
    pairs = row.fields.get("history") or []
    are_pairs = isinstance(pairs, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    if not are_pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise DataError(f"{row.where}: history is not a list of pairs (question, answer) of text.")
    return [(asked, answer) for asked, answer in pairs]


def _with_system(row: Row, example: Example) -> Example:
    """The example after the system message of the column ``system``, if the row has one."""
    if not row.fields.get("system"):
        return example
    if example.messages[0]["role"] == "system":
        raise DataError(f"{row.where} has a column system, and a system message in messages as well; keep one of them.")
    system = {"role": "system", "content": _text(row, "system")}
    unlearned = frozenset(number + 1 for number in example.unlearned)
    return replace(example, messages=(system, *example.messages), unlearned=unlearned)


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    return tuple(
        tool for column in ("tools", "functions") for tool in read_tools(row.fields.get(column), column, row.where)
    )


def _labelled(row: Row) -> Example:
    label = row.fields["label"]
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # as pandas writes whole numbers of a column in which one is missing
    if not isinstance(label, (str, int)):
        what = f" ({label:g})" if isinstance(label, float) else ""
        raise DataError(f"{row.where}: label is a {type(label).__name__}{what}; a class is a name or a whole number.")
    return Example(row.where, prompt=f"{_text(row, 'text')}\n", answer=str(label))


def _is_blank(label: Any) -> bool:
    """Whether a label is none: an empty cell of a table."""
    if isinstance(label, float):
        return math.isnan(label)
    return label is None or (isinstance(label, str) and not label.strip())


def _plain(row: Row) -> Example:
    return Example(row.where, answer=_text(row, "text"))


_READ = {
    "messages": _conversation,
    "prompt/completion": _prompted,
    PAIRS: _pair,
    JUDGED: _judged,
    "instruction/output": _instruction,
    "text/label": _labelled,
    "text": _plain,
}


def _text(row: Row, column: str) -> str:
    value = row.fields[column]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {column} is a {type(value).__name__}, not text.")
    return value
