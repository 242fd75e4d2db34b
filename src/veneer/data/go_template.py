"""A chat template as Ollama has templates, in Go's language, and the same rendered here: what cannot be written so is
refused, since a model that is asked in another form than it was trained in answers worse.

Ollama itself cannot be asked here. `rendered_by_go` understands the part of Go's text/template that `written` uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from veneer.errors import DataError

Messages = list[dict[str, str]]
Ask = Callable[[Messages], str]  # a conversation → the text up to where the model is to answer

_SYSTEM, _USER, _ANSWER, _AGAIN = "veneermarksystem", "veneermarkuser", "veneermarkanswer", "veneermarkagain"
PROMPT_ALONE = "{{ .Prompt }}"


@dataclass(frozen=True)
class _Pieces:
    """What stands around the messages of a conversation."""

    first: str  # before a user message that nothing comes before
    system: str | None  # before a system message; None where the template takes none
    after_system: str  # between a system message and a user's
    asked: str  # between a user's message and the answer
    answered: str  # between an answer and the next user's message


def written(ask: Ask) -> tuple[str, bool]:
    """The template by which Ollama renders conversations as ``ask`` does, and whether it takes a system message.

    Raises DataError where there is none: conversations are rendered both ways.
    """
    pieces = _pieces(ask)
    text = _text_of(pieces)
    for messages in _conversations(pieces.system is not None):
        if rendered_by_go(text, messages) != ask(messages):
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"it writes a conversation of {roles} in a form that depends on more than roles")
    return text, pieces.system is not None


def _pieces(ask: Ask) -> _Pieces:
    first, asked = _around(ask([_message("user", _USER)]), _USER)
    parts = _around(ask(_talk((_USER, _ANSWER, _AGAIN), "user")), _USER, _ANSWER, _AGAIN)
    try:
        with_system = ask(_talk((_SYSTEM, _USER), "system"))
    except DataError:  # the template refuses it
        with_system = ""
    if _SYSTEM not in with_system:
        return _Pieces(first, None, "", asked, parts[2])
    system, after, _ = _around(with_system, _SYSTEM, _USER)
    return _Pieces(first, system, after, asked, parts[2])


def _around(text: str, *marks: str) -> list[str]:
    """The texts before, between and after marks. Raises DataError where they are not in the text once, in turn."""
    found = []
    for mark in marks:
        before, here, text = text.partition(mark)
        if not here or mark in text:
            raise DataError("it does not write each message once, in turn")
        found.append(before)
    return [*found, text]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _talk(contents: tuple[str, ...], begin: str) -> Messages:
    roles = ["system", "user", "assistant", "user"] if begin == "system" else ["user", "assistant", "user"]
    return [_message(role, content) for role, content in zip(roles, contents, strict=False)]


def _conversations(system: bool) -> list[Messages]:
    """Conversations of which the template was not made."""
    plain = [_talk(("Who wrote it?",), "user"), _talk(("Why {{ not }}?", 'It\'s "so".', "And\nthen?"), "user")]
    if not system:
        return [*plain, _talk(("1", "2", "3"), "user")]
    return [*plain, _talk(("Be brief.", "Who?"), "system"), _talk(("Be brief.", "Who?", "She.", "When?"), "system")]


def _text_of(pieces: _Pieces) -> str:
    """Nothing but actions, so that no white space of this text comes into the prompt."""
    system = f'{{{{ if eq .Role "system" }}}}{_said(pieces.system)}{{{{ .Content }}}}{{{{ else }}}}'
    takes = pieces.system is not None
    after = f'{{{{ else if eq $last "system" }}}}{_said(pieces.after_system)}' if takes else ""
    return (
        '{{ $last := "" }}{{ range .Messages }}'
        + (system if takes else "")
        + f'{{{{ if eq .Role "user" }}}}{{{{ if eq $last "" }}}}{_said(pieces.first)}{after}'
        + f"{{{{ else }}}}{_said(pieces.answered)}{{{{ end }}}}{{{{ .Content }}}}"
        + f'{{{{ else if eq .Role "assistant" }}}}{_said(pieces.asked)}{{{{ .Content }}}}{{{{ end }}}}'
        + ("{{ end }}" if takes else "")
        + "{{ $last = .Role }}{{ end }}"
        + f'{{{{ if eq $last "user" }}}}{_said(pieces.asked)}{{{{ end }}}}'
    )


def _said(text: str | None) -> str:
    """A text as an action, in which Go reads what JSON writes."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def rendered_by_go(template: str, messages: Messages) -> str:
    """What Ollama makes of ``messages`` by a template of `written`. Raises DataError for what this does not
    understand."""
    actions = _parsed(template)
    body, rest = _block(actions, 0)
    if rest != len(actions):
        raise DataError("The template closes a block that it did not open.")
    scope: dict[str, Any] = {"Messages": messages}
    return "".join(_run(body, scope, {}))


def _parsed(template: str) -> list[tuple[str, str]]:
    """Texts and actions, in order; braces inside an action's own text are part of it."""
    made: list[tuple[str, str]] = []
    place = 0
    while place < len(template):
        start = template.find("{{", place)
        if start < 0:
            start = len(template)
        if start > place:
            made.append(("text", template[place:start]))
        if start == len(template):
            break
        end = _end_of(template, start + 2)
        made.append(("action", template[start + 2 : end].strip()))
        place = end + 2
    return made


def _end_of(template: str, place: int) -> int:
    inside = False
    while place < len(template):
        if inside and template[place] == "\\":
            place += 1
        elif template[place] == '"':
            inside = not inside
        elif not inside and template.startswith("}}", place):
            return place
        place += 1
    raise DataError("The template does not close an action.")


def _block(actions: list[tuple[str, str]], place: int) -> tuple[list[Any], int]:
    """The actions up to the end or the else of the block that began at ``place``."""
    found: list[Any] = []
    while place < len(actions):
        kind, text = actions[place]
        if kind == "action" and (text == "end" or text.startswith("else")):
            return found, place
        if kind == "action" and text.startswith(("if ", "range ")):
            branches = []
            head = text
            while True:
                body, place = _block(actions, place + 1)
                if place == len(actions):
                    raise DataError("The template does not close a block.")
                branches.append((head, body))
                head = actions[place][1]
                if head == "end":
                    break
            found.append(branches)
        else:
            found.append((kind, text))
        place += 1
    return found, place


def _run(body: list[Any], scope: dict[str, Any], variables: dict[str, Any]) -> list[str]:
    made: list[str] = []
    for one in body:
        if isinstance(one, list):
            made += _branch(one, scope, variables)
        elif one[0] == "text":
            made.append(one[1])
        elif assigned := re.fullmatch(r"(\$\w+) :?= (.+)", one[1]):
            variables[assigned[1]] = _value(assigned[2], scope, variables)
        else:
            made.append(str(_value(one[1], scope, variables)))
    return made


def _branch(branches: list[Any], scope: dict[str, Any], variables: dict[str, Any]) -> list[str]:
    head, body = branches[0]
    if head.startswith("range "):
        of = _value(head.removeprefix("range "), scope, variables)
        return [part for message in of for part in _run(body, {k.title(): v for k, v in message.items()}, variables)]
    for head, body in branches:
        condition = head.removeprefix("else").strip().removeprefix("if").strip()
        if not condition or _value(condition, scope, variables):
            return _run(body, scope, variables)
    return []


def _value(text: str, scope: dict[str, Any], variables: dict[str, Any]) -> Any:
    if text.startswith("eq "):
        one, other = text.removeprefix("eq ").split(" ", 1)
        return _value(one, scope, variables) == _value(other, scope, variables)
    if text.startswith('"'):
        return json.loads(text)
    if text in variables:
        return variables[text]
    if text.startswith(".") and text[1:] in scope:
        return scope[text[1:]]
    raise DataError(f"The template has {text!r}, which is not understood here.")
