"""A row's list of messages → messages as chat templates take them, in one form: OpenAI's others become it.

A message is more than its content: it may call tools, or say that it is not to be learned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.documents import parsed_json
from veneer.errors import DataError, did_you_mean, nearest, shown

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_LEARNED_BY = ("weight", "train", "loss")  # OpenAI's key and two others' for whether an answer is learned


# Who speaks in ShareGPT's form, and in those of LLaMA-Factory and others that have its keys.
_SHAREGPT = {
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "chatgpt", "bot", "model", "function_call"),
    "system": ("system",),
    "tool": ("tool", "observation", "function_response"),
}
FROM_ASSISTANT = _SHAREGPT["assistant"]


@dataclass(frozen=True)
class Conversation:
    """Messages of a row, and the numbers (from 0) of those that the row says are not to be learned."""

    messages: tuple[Message, ...]
    unlearned: frozenset[int]


def read_conversation(value: Any, column: str, where: str) -> Conversation:
    """The messages in ``value``, each with a role, a content that is text, and perhaps ``tool_calls`` whose arguments
    are objects.

    Content that is null or absent beside a call is "", a list of text parts their text; the role ``function`` and the
    key ``function_call`` become ``tool`` and ``tool_calls``. Keys without a value are dropped, others kept, for a
    template may use them. Raises DataError for anything else.

    >>> read_conversation([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "messages", "d:1").messages
    ({'role': 'user', 'content': 'Hi'},)
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {column} is not a list of messages.")
    messages, unlearned = [], set()
    for number, message in enumerate(value):
        place = f"{where}: message {number + 1} of {column}"
        read, learned = _message(message, place)
        messages.append(read)
        if not learned:
            unlearned.add(number)
    return Conversation(tuple(messages), frozenset(unlearned))


def read_tools(value: Any, column: str, where: str) -> tuple[dict[str, Any], ...]:
    """The descriptions of a row's tools, from a list of objects or from JSON text of one; of the old column
    ``functions`` in today's form. None and "" are no tools. Raises DataError for anything else."""
    tools = _from_json(value)
    tools = [_from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if tools is None or tools == "":
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: {column} is no list of tools (objects, or JSON text of such a list).")
    return tuple(
        {"type": "function", "function": tool} if column == "functions" or _is_bare(tool) else tool for tool in tools
    )


def _is_bare(tool: dict[str, Any]) -> bool:
    """Whether this is a function's description without what OpenAI puts around it."""
    return isinstance(tool.get("name"), str) and "function" not in tool and "type" not in tool


def calls_text(message: Message) -> str:
    """The calls of a message as JSON text; "" where it has none."""
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    return json.dumps(calls, ensure_ascii=False) if calls else ""


def said_in(message: Message) -> str:
    """What a message says, for a person: its content, and its calls."""
    return "\n".join(part for part in (str(message["content"]), calls_text(message)) if part)


def fold_turns(messages: tuple[Message, ...], learned: Sequence[bool]) -> tuple[tuple[Message, ...], list[bool]]:
    """The messages with the system message in the first user turn and successive turns of one role as one, and which of
    them are ``learned``, as was said of the given ones.

    Tools' results, turns with calls, and answers of which one is learned and one is not stay apart.
    """
    folded: list[Message] = []
    marks: list[bool] = []
    for message, mark in zip(messages, learned, strict=True):
        before = folded[-1] if folded else {}
        system = before.get("role") in ("system", "developer") and message["role"] == "user"
        same = before.get("role") == message["role"] != "tool" and marks[-1] == mark
        if (system or same) and not before.get("tool_calls") and not message.get("tool_calls"):
            folded[-1] = {**before, "role": message["role"], "content": f"{before['content']}\n\n{message['content']}"}
        else:
            folded.append(message)
            marks.append(mark)
    return tuple(folded), marks


def _message(message: Any, place: str) -> tuple[Message, bool]:
    """A message in its form, and whether it is learned if it is an answer."""
    if isinstance(message, dict) and isinstance(message.get("from"), str) and "role" not in message:
        message = _from_sharegpt(message, place)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{place} is not an object with role and content (text).")
    read = {name: value for name, value in message.items() if value is not None}
    learned = all(_is_learned(read.pop(name), name, place) for name in _LEARNED_BY if name in read)
    if read["role"] == "function":
        read["role"] = "tool"
    if read["role"] not in ROLES:
        close = nearest(read["role"], ROLES, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(f"{place} has the role {read['role']!r}; roles are {', '.join(ROLES)}.{hint}")
    calls = _calls(read, place)
    for name in ("tool_calls", "function_call"):
        read.pop(name, None)
    content = _content(read.get("content", "" if calls else None), place)
    return {"role": read.pop("role"), **read, "content": content, **({"tool_calls": calls} if calls else {})}, learned


def _content(value: Any, place: str) -> str:
    if isinstance(value, list):
        return "".join(_part(part, place) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{place} is not an object with role and content (text).")
    return value


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{place} has a part of the type {shown(kind)}; only parts of the type 'text' are read.")
    return str(part["text"])


def _calls(message: Message, place: str) -> list[dict[str, Any]]:
    """The calls of a message, their arguments as objects."""
    calls = _from_json(message.get("tool_calls") or [])
    if message.get("function_call"):
        calls = [*calls, {"type": "function", "function": _from_json(message["function_call"])}]
    if not isinstance(calls, list):
        raise DataError(f"{place} has tool_calls that are no list.")
    return [_call(call, place) for call in calls]


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place} has a tool call without a function's name.")
    arguments = _from_json(function.get("arguments") or {})
    if not isinstance(arguments, dict):
        raise DataError(
            f"{place} calls {function['name']} with arguments that are no JSON object: {shown(function['arguments'])}."
        )
    function = {**function, "arguments": arguments}
    return {"type": "function", **(call if "function" in call else {}), "function": function}


def _from_json(value: Any) -> Any:
    """What JSON text holds; anything else, and text that is no JSON, as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parsed_json(value)
    except ValueError:
        return value


def _is_learned(value: Any, name: str, place: str) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return True
    if value not in (0, 1):
        raise DataError(f"{place} has {name} = {shown(value)}; an answer is learned (1, true) or not (0, false).")
    return bool(value)


def _from_sharegpt(message: Message, place: str) -> Message:
    """A message of ShareGPT's keys, from and value, with those of OpenAI; keys beside them stay."""
    said = message["from"].lower()
    role = next((role for role, names in _SHAREGPT.items() if said in names), None)
    if role is None:
        known = [name for names in _SHAREGPT.values() for name in names]
        raise DataError(f"{place} is from {shown(said)}; it may be {', '.join(known)}.{did_you_mean(said, known)}")
    value = message.get("value")
    others = {name: inner for name, inner in message.items() if name not in ("from", "value")}
    if said == "function_call":
        return {**others, "role": role, "tool_calls": called(value) or [{"function": _from_json(value)}]}
    return {**others, "role": role, "content": value}


def called(value: Any) -> list[dict[str, Any]] | None:
    """The calls in a list of objects with a name and arguments, or JSON text of it or of one; None where it is none.

    >>> called('[{"name": "weather", "arguments": {"city": "Rome"}}]')[0]["function"]["name"]
    'weather'
    """
    calls = _from_json(value)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        return None
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call for call in calls):
        return None
    return [{"type": "function", "function": call} for call in calls]
