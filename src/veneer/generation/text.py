"""Tokens → text, up to where it is to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def answer_text(tokenizer: Any, ids: list[int], stops: Sequence[str] = ()) -> str:
    """The text of an answer's tokens, without special tokens, up to the first of the texts ``stops``."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text[: _stop_in(text, stops)]


class Text:
    """Tokens → text as they come; a character of several tokens comes when it is whole, and what may be the beginning
    of a stop text when it is none. ``stopped``: whether a stop text has come."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._given = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """What is new with this token; nothing while a character, or what may be a stop text, is incomplete."""
        self._ids.append(token)
        text = self._decoded()
        if self.stopped:
            return self._new(text)
        return "" if text.endswith("\ufffd") else self._new(text[: len(text) - _begun(text, self._stops)])

    def end(self) -> str:
        """What remains, an incomplete character included."""
        return self._new(self._decoded())

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        end = _stop_in(text, self._stops)
        self.stopped = end is not None
        return text[:end]

    def _new(self, text: str) -> str:
        new, self._given = text[len(self._given) :], text if len(text) > len(self._given) else self._given
        return new


def _stop_in(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins; None where none is in the text."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop text."""
    return max((length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])), default=0)
