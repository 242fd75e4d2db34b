"""Rows of any known shape → examples: what the model is given, and what it is to answer."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from veneer.data.bad import BadRows
from veneer.data.columns import SHAPES, Reading, Recognised, recognise
from veneer.data.files import Row, is_text
from veneer.data.kept import Kept, those_of
from veneer.data.messages import Message, called, read_conversation, read_tools, said_in
from veneer.data.preferences import JUDGED, PAIRS, judgement, sides
from veneer.errors import DataError

_KINDS = 20  # sets of columns that are looked at, where bad rows are left out


@dataclass(frozen=True)
class Example:
    """One row in the form that training and evaluation use.

    A conversation has ``messages``, of which those from number ``given`` on may be learned, except the ``unlearned``
    ones, and perhaps ``tools``; a prompted text has ``prompt`` and ``answer``; a plain text has an ``answer`` and no
    prompt (None).

    A row of several labels has ``labels``, perhaps none of them, and their names as its answer.

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
    times: float = 1.0  # how often it is learned in an epoch
    rejected: Example | None = None
    desirable: bool | None = None
    labels: tuple[str, ...] | None = None  # of a text that may have several

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
    columns: dict[str, str] = field(default_factory=dict)  # name → column, where they differ
    read_as: str = ""  # what to say of these

    def notes(self) -> list[str]:
        """What the user should know of the rows."""
        unused = [f"Columns not used ({self.shape} rows): {', '.join(self.unused)}."] if self.unused else []
        return [self.read_as] * bool(self.read_as) + unused + self.left_out()

    def left_out(self) -> list[str]:
        """A sentence about rows without a label; none where each has one."""
        return [f"{counted_rows(self.unlabelled)} left out: the label is empty."] if self.unlabelled else []


def to_examples(rows: Sequence[Row], reading: Reading | None = None, bad: BadRows | None = None) -> Examples:
    """Recognise the shape and read every row by it, as ``reading`` says.

    Rows that do not fit go to ``bad``; without it the first one is an error. Raises DataError with file and line for a
    row that does not fit, and where no row of texts has a label.
    """
    found = _recognised(rows, reading, tolerant=bad is not None)
    own = BadRows()
    items, unlabelled = Kept[Example](), []
    for row in rows:
        named = found.named(row)
        if (name := _LABELS.get(found.shape)) and found.columns[name] in row.fields and _is_blank(named.fields[name]):
            unlabelled.append(row.where)
            continue
        with own.instead_of_an_error(row.where):
            items.append(_example(row, named, found))
    if bad is None or not len(items):
        own.refuse()
    if not len(items):
        raise DataError(f"None of the {len(rows)} rows has a label; the first is {rows[0].where}.")
    if bad is not None:
        bad.rows += own.rows
    columns = dict.fromkeys(column for row in rows for column in row.fields)
    return Examples(found.shape, items, found.unused(columns), unlabelled, found.renamed, found.note())


def _recognised(rows: Sequence[Row], reading: Reading | None, *, tolerant: bool) -> Recognised:
    """The shape of the rows: of the first, or, where bad rows are left out, of the most that have the same columns."""
    if tolerant:
        kinds: dict[tuple[str, ...], array[int]] = {}
        for number, row in enumerate(rows):
            kinds.setdefault(tuple(row.fields), array("q")).append(number)
        for alike in sorted(kinds.values(), key=len, reverse=True)[:_KINDS]:
            with suppress(DataError):
                return recognise(those_of(rows, alike), reading)
    return recognise(rows, reading)


def _example(row: Row, named: Row, found: Recognised) -> Example:
    """Raises DataError for a row that does not fit the shape."""
    missing = [found.columns[name] for name in SHAPES[found.shape][0] if named.fields.get(name) is None]
    if missing:
        raise DataError(f"{row.where} has no {' and no '.join(missing)} (its columns: {row.names()}).")
    for name, column in found.columns.items():
        _refuse_half_pairs(named.fields[name], f"{row.where}: {column}")
    return _READ[found.shape](named)


def _refuse_half_pairs(value: Any, place: str) -> None:
    """Raises DataError for a text with half of a surrogate pair, which no encoding has."""
    if isinstance(value, str) and not is_text(value):
        number, half = next((number, sign) for number, sign in enumerate(value) if not is_text(sign))
        raise DataError(
            f"{place} has {half!r} as its character {number + 1}, half of a surrogate pair, which is no character: the "
            f"text was cut or decoded wrongly."
        )
    if isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            _refuse_half_pairs(inner, place)


def joined(parts: list[Examples]) -> Examples:
    """The examples of several sources as those of one; ``shape`` names theirs."""
    if len(parts) == 1:
        return parts[0]
    return Examples(
        " and ".join(dict.fromkeys(part.shape for part in parts)),
        Kept(chain.from_iterable(part.items for part in parts)),
        list(dict.fromkeys(column for part in parts for column in part.unused)),
        [where for part in parts for where in part.unlabelled],
        {name: column for part in parts for name, column in part.columns.items()},
        " ".join(dict.fromkeys(part.read_as for part in parts if part.read_as)),
    )


def with_system(example: Example, system: str | None) -> Example:
    """A conversation after this system message, if it begins with none; any other example as it is."""
    if not system or not example.messages or example.messages[0]["role"] in ("system", "developer"):
        return example
    return replace(
        example, messages=({"role": "system", "content": system}, *example.messages),
        given=example.given + 1 if example.given else 0,
        unlearned=frozenset(number + 1 for number in example.unlearned),
    )  # fmt: skip


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


def labels_in(example: Example) -> tuple[str, ...]:
    """The names of an example's labels: of several or none; else of its class, if it has one."""
    if example.labels is not None:
        return example.labels
    name = class_of(example)
    return (name,) if name else ()


def named_labels(labels: Iterable[str]) -> str:
    """Several labels as one answer, whatever their order: "music, sport"; of none an empty one."""
    return ", ".join(sorted(labels))


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
    tools = _tools(row)
    calls = called(row.fields["output"]) if tools else None
    answer = {"tool_calls": calls} if calls else {"content": _text(row, "output")}
    messages = [
        {"role": role, "content": content}
        for pair in _history(row) for role, content in zip(("user", "assistant"), pair, strict=True)
    ]  # fmt: skip
    messages.append({"role": "user", "content": "\n\n".join(part for part in parts if part)})
    read = read_conversation([*messages, {"role": "assistant", **answer}], "output", row.where)
    return _with_system(row, Example(row.where, read.messages, tools=tools))


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
    return with_system(example, _text(row, "system"))


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    return tuple(
        tool for column in ("tools", "functions") for tool in read_tools(row.fields.get(column), column, row.where)
    )


def _labelled(row: Row) -> Example:
    return Example(row.where, prompt=f"{_text(row, 'text')}\n", answer=_label(row.fields["label"], "label", row.where))


def _label(label: Any, column: str, where: str) -> str:
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # as pandas writes whole numbers of a column in which one is missing
    if not isinstance(label, (str, int)):
        what, todo = f" a {type(label).__name__}", ""
        if isinstance(label, float):
            what, todo = f"{what} ({label:g})", " (to learn numbers: task: regression)"
        raise DataError(f"{where}: {column} is{what}; a class is a name or a whole number{todo}.")
    return str(label)


def _several_labels(row: Row) -> Example:
    given = row.fields["labels"]
    if not isinstance(given, list | tuple):
        raise DataError(
            f"{row.where}: labels is {_KIND_OF.get(type(given), 'a text')}, not a list of names; one label a row "
            f"belongs into a column label."
        )
    labels = tuple(dict.fromkeys(_label(label, "labels", row.where).strip() for label in given))
    if not all(labels):
        raise DataError(f"{row.where}: labels has an empty name.")
    return Example(row.where, prompt=f"{_text(row, 'text')}\n", answer=named_labels(labels), labels=labels)


def _numbered(row: Row) -> Example:
    label = row.fields["label"]
    try:
        if isinstance(label, bool) or not math.isfinite(float(label)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{row.where}: label is {str(label)[:60]!r}, which is no finite number.") from None
    return Example(row.where, prompt=f"{_text(row, 'text')}\n", answer=str(label).strip())


def _is_blank(label: Any) -> bool:
    """Whether a label is none: an empty cell of a table."""
    if isinstance(label, float):
        return math.isnan(label)
    return label is None or (isinstance(label, str) and not label.strip())


def _plain(row: Row) -> Example:
    return Example(row.where, answer=_text(row, "text"))


# Shape → the name of what may be blank in some rows, which are left out then.
_LABELS = {"text/label": "label", "text/labels": "labels", "text/number": "label"}
_READ = {
    "messages": _conversation,
    "prompt/completion": _prompted,
    PAIRS: _pair,
    JUDGED: _judged,
    "instruction/output": _instruction,
    "text/label": _labelled,
    "text/labels": _several_labels,
    "text/number": _numbered,
    "text": _plain,
}


def _text(row: Row, column: str) -> str:
    value = row.fields[column]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {column} is {_KIND_OF.get(type(value), 'something else')}, not text.")
    return value


_KIND_OF: dict[type, str] = {
    bool: "true or false", float: "a number with a fraction", list: "a list", dict: "an object", type(None): "empty"
}  # fmt: skip
