"""A conversation in its model's chat template, cut where the answers that are learned begin and end.

A template renders a whole conversation. Where the text of the first messages begins the text of all of them, all
answers are learned in one row. Some templates change what is before an answer once others follow: those of thinking
models take the thinking out of earlier answers. There each answer is a row, after the text that the model will see.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from veneer.data.bound import Bound, excess_of
from veneer.data.dates import date_arguments
from veneer.data.formats import Example
from veneer.data.messages import Message, fold_turns
from veneer.errors import DataError

Piece = tuple[str, bool]  # a text, and whether it is an answer that is learned

_THINKS = re.compile(r"<think>\s*$")
_PROBE = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "callprobe", "type": "function", "function": {"name": "f", "arguments": {"veneer": "probe"}}}
]}  # fmt: skip
_PLAIN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name"}


@dataclass(frozen=True)
class Rendered:
    """The rows that a conversation is learned in, each as pieces of text in order; and what a person should know."""

    rows: list[list[Piece]]
    split: bool = False  # whether each answer is a row because the template changes earlier text
    unasked: bool = False  # whether an answer comes before any question, which is given and not learned
    missing: tuple[str, ...] = ()  # what the template leaves out: "the system message", "the tools"
    unused_keys: tuple[str, ...] = ()  # of messages


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with ``arguments`` of its own; ``fold``: see `fold_turns`."""

    tokenizer: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fold: bool = False

    def question(self, messages: tuple[Message, ...], where: str) -> str:
        """The text up to where the model is to answer. Raises DataError where the template refuses the messages."""
        example = self._folded(Example(where, messages))
        return self._text(example, len(example.messages), ask=True)

    def render(self, example: Example, *, everything: bool = False) -> Rendered:
        """``everything``: all is learned, so that a row need not be cut where its answers are.

        Raises DataError where the template refuses the conversation, or an answer cannot be located in its text.
        """
        example = self._folded(example)
        whole = self._text(example, len(example.messages), ask=False)
        prompts = self._prompts(example)
        unasked = len(prompts) < len(_said(example))
        pieces = self._one_row(example, prompts, whole)
        if pieces is None and everything:
            pieces = [(_through_end_token(whole, self.tokenizer)[0], True)]
        rows = [pieces] if pieces is not None else self._a_row_an_answer(example, prompts)
        text = "".join(part for row in rows for part, _ in row)
        shown = replace(example, messages=example.messages[: None if pieces is not None else max(prompts) + 1])
        return Rendered(
            rows, pieces is None and len(rows) > 1, unasked, self._missing(shown, text, whole), self._unused(example)
        )

    def _folded(self, example: Example) -> Example:
        if not self.fold:
            return example
        messages, learned = fold_turns(example.messages, example.learned())
        answers = (number for number, message in enumerate(messages) if message["role"] == "assistant")
        return replace(
            example, messages=messages, given=0, unlearned=frozenset(n for n in answers if not learned[n])
        )  # fmt: skip

    def _prompts(self, example: Example) -> dict[int, str]:
        """The number of each answer that can be learned → the text that the model is asked with. An answer that nothing
        comes before, or only what the template takes for no question, is none."""
        prompts = {}
        for number in _said(example):
            if not number:
                continue
            try:
                prompts[number] = self._text(example, number, ask=True)
            except DataError:
                if any(message["role"] == "user" for message in example.messages[:number]):
                    raise
        return prompts

    def _one_row(self, example: Example, prompts: dict[int, str], whole: str) -> list[Piece] | None:
        """All answers in one row; None where the text of the first messages does not begin the text of all."""
        pieces: list[Piece] = []
        done = ""
        for number, before in prompts.items():
            after = self._text(example, number + 1, ask=False)
            if not (before.startswith(done) and after.startswith(before)):
                return None
            answer, rest = _through_end_token(after[len(before) :], self.tokenizer)
            pieces += [(before[len(done) :], False), (answer, True)]
            done = after[: len(after) - len(rest)]
        if not whole.startswith(done):
            return None
        return [*pieces, (whole[len(done) :], False)] if whole[len(done) :].strip() else pieces

    def _a_row_an_answer(self, example: Example, prompts: dict[int, str]) -> list[list[Piece]]:
        return [
            [(before, False), (_through_end_token(self._answer(example, number, before), self.tokenizer)[0], True)]
            for number, before in prompts.items()
        ]

    def _answer(self, example: Example, number: int, before: str) -> str:
        """The answer as the model is to write it after ``before``."""
        after, message = self._text(example, number + 1, ask=False), example.messages[number]
        if after.startswith(before):
            return after[len(before) :]
        opened = _THINKS.search(before)
        shorter = before[: opened.start()] if opened else before
        if opened and after.startswith(shorter):
            return _after_thinking(after[len(shorter) :], message, before)
        asked = self._text(example, number, ask=False)
        mark = shorter[len(asked) :] if shorter.startswith(asked) else ""
        if mark.strip() and mark in after:
            answer = after[after.rindex(mark) + len(mark) :]
            return _after_thinking(answer, message, before) if opened else answer
        content = str(message["content"]).strip()
        if content and content in after:
            start = after.rindex(content)
            space = after[len(after[:start].rstrip()) : start]
            return after[start - len(space) * (not before.endswith(space)) :]
        raise DataError(
            f"{example.where}: the chat template of {self.tokenizer.name_or_path} writes message {number + 1} in a "
            f"text in which it cannot be located; use prompt and completion columns."
        )

    def _text(self, example: Example, count: int, *, ask: bool) -> str:
        """The first ``count`` messages; ``ask``: up to where the model is to answer."""
        if not self.tokenizer.chat_template:
            raise DataError(_no_template(self.tokenizer, example))
        made = self._apply(list(example.messages[:count]), example.tools, ask)
        if isinstance(made, Exception):
            raise DataError(
                f"{example.where}: the chat template refuses this conversation: {made}{self._hint(example)}"
            ) from None
        return made

    def _apply(self, messages: list[Message], tools: tuple[dict[str, Any], ...], ask: bool) -> str | Exception:
        if self._arguments_as_text and any("tool_calls" in message for message in messages):
            messages = [_with_text_arguments(message) for message in messages]
        return self._rendered(messages, tools, ask)

    def _rendered(self, messages: list[Any], tools: tuple[dict[str, Any], ...], ask: bool) -> str | Exception:
        """What the template writes, or raises: it is a program of the model's, which may raise anything."""
        if self._excess:
            return ValueError(f"it holds {self._excess}, which can fill any memory")
        how = {"tools": list(tools) or None, **date_arguments(self.tokenizer), **self.arguments}
        try:
            made = self._bound.run(
                lambda: self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **how)
            )
        except Exception as error:
            return error
        return cast(str, made)

    @cached_property
    def _excess(self) -> str | None:
        templates = self.tokenizer.chat_template
        texts = templates.values() if isinstance(templates, dict) else [templates or ""]
        return next(filter(None, (excess_of(text) for text in texts if isinstance(text, str))), None)

    @cached_property
    def _bound(self) -> Bound:
        return Bound()

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether this template writes the arguments of a call as they are, so that it needs them as JSON text."""
        if "tool_calls" not in str(self.tokenizer.chat_template):
            return False
        asked = {"role": "user", "content": "a"}
        made = [self._rendered([asked, called], (), False) for called in (_PROBE, _with_text_arguments(_PROBE))]
        as_object, as_text = ("" if isinstance(text, Exception) else text for text in made)
        return "{'veneer': 'probe'}" in as_object or bool(as_text and not as_object)

    def _hint(self, example: Example) -> str:
        folded = replace(self, fold=True)._folded(example)
        if self.fold or len(folded.messages) == len(example.messages):
            return ""
        if isinstance(self._apply(list(folded.messages), example.tools, False), Exception):  # for another reason, then
            return ""
        return (
            ". With fold_turns: true the system message goes into the first user turn and successive turns of one role "
            "become one, which this template takes."
        )

    def _missing(self, example: Example, text: str, whole: str) -> tuple[str, ...]:
        """What of the ``example`` is not in the ``text`` of its rows; ``whole``: all of the conversation's."""
        missing: dict[str, None] = {}
        for message in example.messages:
            content = str(message["content"]).rpartition("</think>")[2].strip()
            forms = (json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True))  # as tojson writes it
            if content and content not in text and not any(form in text for form in forms):
                missing[f"the {message['role']} message"] = None
        silent = tuple({**message} for message in example.messages)
        calls = [message.pop("tool_calls", None) for message in silent]
        if any(calls) and self._writes(silent, example.tools, whole):
            missing["the tool calls"] = None
        if example.tools and self._writes(example.messages, (), whole):
            missing["the tools"] = None
        return tuple(missing)

    def _writes(self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...], text: str) -> bool:
        """Whether the template writes just this text, which it need not take the messages for."""
        return self._apply(list(messages), tools, ask=False) == text

    def _unused(self, example: Example) -> tuple[str, ...]:
        known = str(self.tokenizer.chat_template)
        keys = dict.fromkeys(key for message in example.messages for key in message if key not in _PLAIN_KEYS)
        return tuple(key for key in keys if key not in known)


def _said(example: Example) -> list[int]:
    """The answers to be learned that say something: text, or a call."""
    return [n for n in example.answers() if example.messages[n]["content"] or example.messages[n].get("tool_calls")]


def _after_thinking(rest: str, message: Message, before: str) -> str:
    """An answer after a prompt that opens ``<think>``, of which the template has taken the thinking out: the thinking
    that the message has, or none, closed, and then ``rest``."""
    rest, content = rest.removeprefix("<think>"), str(message["content"])
    start = "" if before.endswith("\n") else "\n"
    if "</think>" in rest:
        return start + rest.lstrip("\n")
    own = content.partition("</think>")[0].replace("<think>", "") if "</think>" in content else ""
    thought = str(message.get("reasoning_content") or own).strip("\n")
    return f"{start}{thought}\n</think>\n\n{rest.lstrip()}"


def _with_text_arguments(message: Message) -> Message:
    calls = [
        {**call, "function": {
            **call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
        }}
        for call in message.get("tool_calls", ())
    ]  # fmt: skip
    return {**message, "tool_calls": calls} if calls else message


def _no_template(tokenizer: Any, example: Example) -> str:
    return (
        f"{example.where} is a conversation, but the tokenizer of {tokenizer.name_or_path} has no chat template; "
        f"give one (template: chatml, alpaca, or a file), use prompt and completion columns, or the model's instruct "
        f"variant."
    )


def _through_end_token(text: str, tokenizer: Any) -> tuple[str, str]:
    """An answer through its end token, and what the template writes after it; an end token is added if it has none."""
    ends = [token for token in tokenizer.all_special_tokens if token in text]
    if not ends:
        return text + (tokenizer.eos_token or ""), ""
    stop = max(text.rindex(token) + len(token) for token in ends)
    return text[:stop], text[stop:]
