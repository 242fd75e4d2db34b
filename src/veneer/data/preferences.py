"""Rows that say which of two answers is better, or whether one is good → rows of a prompt and a completion each.

What is asked is what chosen and rejected share: the column ``prompt``, or the beginning of both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from veneer.data.files import Row
from veneer.data.messages import Message, read_conversation
from veneer.errors import DataError, shown

PAIRS = "chosen/rejected"
JUDGED = "prompt/completion/label"
# The shapes by their columns, as in `columns.SHAPES`.
PREFERENCE_SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    PAIRS: (("chosen", "rejected"), ("prompt", "system", "tools", "functions")),
    JUDGED: (("prompt", "completion", "label"), ("system", "tools", "functions")),
}
_TRUTH = {"true": True, "false": False}
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_BY_CHANCE = 20  # characters of a prompt that an answer may begin with, too
_TURN = re.compile(r"\n\n(Human|Assistant):")


def preference_shape(rows: Sequence[Row]) -> str | None:
    """The shape of rows with preferences, by the columns of the first; None of any others.

    A label is a judgement where it is true or false in any row; else it is another column.
    """
    columns = rows[0].fields.keys()
    if {"chosen", "rejected"} <= columns:
        return PAIRS
    judged = {"prompt", "completion", "label"} <= columns and any(
        _truth(row.fields.get("label")) is not None for row in rows
    )
    return JUDGED if judged else None


def sides(row: Row) -> tuple[Row, Row]:
    """The chosen and the rejected answer to what is asked, each a row of prompt and completion: both text, or both
    lists of messages.

    The answers may be texts after the ``prompt``; texts or conversations that begin with it, or share a beginning; or
    transcripts of "\\n\\nHuman:" and "\\n\\nAssistant:" turns. Raises DataError for others, and where nothing is
    shared.

    >>> chosen, rejected = sides(Row({"chosen": "1 + 1 = 2", "rejected": "1 + 1 = 3"}, "rows.jsonl:1"))
    >>> chosen.fields, rejected.fields
    ({'prompt': '1 + 1 =', 'completion': ' 2'}, {'prompt': '1 + 1 =', 'completion': ' 3'})
    """
    chosen, rejected = (_answer(row, column) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not row.fields.get("prompt") and _is_transcript(chosen) and _is_transcript(rejected):
            return _of_conversations(row, _turns(chosen), _turns(rejected))
        return _of_texts(row, chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _of_conversations(row, chosen, rejected)
    raise DataError(f"{row.where}: chosen is {_kind(chosen)}, rejected {_kind(rejected)}; they must be of one kind.")


def judgement(row: Row) -> tuple[Row, bool]:
    """A row of prompt and completion, and whether the completion is good. Raises DataError where the label is neither
    true nor false."""
    label = _truth(row.fields["label"])
    if label is None:
        raise DataError(
            f"{row.where} has the label {shown(row.fields['label'])}, where others have true or false: whether the "
            f"completion is good."
        )
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _of_texts(row, completion, completion)[0], label
    return _asked_and(row, prompt, completion), label


def _truth(label: Any) -> bool | None:
    """The label as a truth value; None where it is none."""
    return _TRUTH.get(str(label).strip().lower()) if isinstance(label, bool | str) else None


def _answer(row: Row, column: str) -> str | list[Any]:
    value = row.fields[column]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, str) or (isinstance(value, list) and value):
        return value
    raise DataError(f"{row.where}: {column} is {_kind(value)}; an answer is text or a list of messages.")


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def _of_texts(row: Row, chosen: str, rejected: str) -> tuple[Row, Row]:
    prompt = row.fields.get("prompt")
    if isinstance(prompt, list) or "system" in row.fields:
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if prompt else []
        if not asked:
            raise DataError(
                f"{row.where} has a system message and no prompt; give the question in a column prompt (its columns: "
                f"{row.names()})."
            )
        both = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        one, other = (_asked_and(row, asked, answer) for answer in both)
        return one, other
    if prompt is None:
        start = _shared_text(chosen, rejected)
        if not start:
            raise DataError(
                f"{row.where} has no prompt, and chosen and rejected share no beginning: give what is asked in a "
                f"column prompt (its columns: {row.names()})."
            )
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    elif not isinstance(prompt, str):
        raise DataError(f"{row.where}: prompt is {_kind(prompt)}, not text.")
    elif len(prompt) > _BY_CHANCE and chosen.startswith(prompt) and rejected.startswith(prompt):
        raise DataError(
            f"{row.where}: chosen and rejected begin with the prompt, which would come twice; leave out the column "
            f"prompt, and it is found as what both begin with."
        )
    one, other = (_asked_and(row, prompt, text) for text in (chosen, rejected))
    return one, other


def _shared_text(chosen: str, rejected: str) -> int:
    """Characters that both begin with, up to the space before the word in which they part."""
    parted = (place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    shared = chosen[: next(parted, min(len(chosen), len(rejected)))]
    spaces = [match.start() for match in re.finditer(r"\s+", shared)]
    return spaces[-1] if spaces else 0


def _of_conversations(row: Row, chosen: list[Any], rejected: list[Any]) -> tuple[Row, Row]:
    read, other = (
        read_conversation(value, column, row.where).messages
        for value, column in ((chosen, "chosen"), (rejected, "rejected"))
    )
    shared = _shared_turns(read, other)
    if any(messages[shared]["role"] != "assistant" for messages in (read, other)):
        raise DataError(
            f"{row.where}: chosen and rejected part at message {shared + 1}, which is the {read[shared]['role']}'s in "
            f"chosen and the {other[shared]['role']}'s in rejected; they must part at an answer."
        )
    asked = _before(row, read[:shared]) + chosen[:shared]
    if not asked:
        raise DataError(f"{row.where} has no prompt, and chosen and rejected begin with different answers.")
    one, two = (_asked_and(row, asked, messages[shared:]) for messages in (chosen, rejected))
    return one, two


def _shared_turns(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """Messages that both begin with; the last of either is its own."""
    most = min(len(chosen), len(rejected)) - 1
    return next((number for number in range(most) if chosen[number] != rejected[number]), most)


def _before(row: Row, shared: tuple[Message, ...]) -> list[Any]:
    """The messages of the column prompt, where the conversations do not begin with them."""
    prompt = row.fields.get("prompt")
    if not prompt:
        return []
    if isinstance(prompt, list):
        messages = read_conversation(prompt, "prompt", row.where).messages
        return [] if shared[: len(messages)] == messages else prompt
    if not shared and isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not any(str(message["content"]).strip() == str(prompt).strip() for message in shared):
        raise DataError(
            f"{row.where}: the prompt is none of the messages that chosen and rejected begin with; keep one of them."
        )
    return []


def _asked_and(row: Row, prompt: Any, completion: Any) -> Row:
    """The row of a prompt and a completion; a system message goes before a conversation."""
    fields = {"prompt": prompt, "completion": completion}
    system = row.fields.get("system")
    if system and isinstance(prompt, list):
        if read_conversation(prompt, "prompt", row.where).messages[0]["role"] == "system":
            raise DataError(f"{row.where} has a column system, and a system message as well; keep one of them.")
        fields["prompt"] = [{"role": "system", "content": system}, *prompt]
    beside = {name: row.fields[name] for name in ("tools", "functions") if row.fields.get(name)}
    return Row({**fields, **beside}, row.where)


def _is_transcript(text: str) -> bool:
    return text.startswith("\n\nHuman:")


def _turns(text: str) -> list[dict[str, str]]:
    _, *parts = _TURN.split(text)
    speakers, contents = parts[::2], parts[1::2]
    return [
        {"role": _SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(speakers, contents, strict=True)
    ]
