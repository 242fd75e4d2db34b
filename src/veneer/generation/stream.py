"""Text as it is generated, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from veneer.data.labels import Renderer
from veneer.generation.session import Session


def pieces(
    model: Any, renderer: Renderer, prompt: list[int], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
    **adapter: Any,
) -> Iterator[str]:  # fmt: skip
    """The text after a prompt (token ids), without special tokens, in pieces as they come; the same text as
    `continuations` gives. ``adapter``: as `Session.add` takes it. Raises DataError as that does, before the first
    piece."""
    session = Session(model, renderer)
    key = session.add(prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, **adapter)
    return _pieces(session, key, Text(renderer.tokenizer))


def _pieces(session: Session, key: int, text: Text) -> Iterator[str]:
    ended = False
    while not ended:
        (added,) = session.step()
        ended = added.ended
        if piece := text.put(added.token):
            yield piece
    if rest := text.end():
        yield rest


class Text:
    """Tokens → text as they come; a character of several tokens comes when it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    def put(self, token: int) -> str:
        """What is new with this token; nothing while a character is incomplete."""
        self._ids.append(token)
        text = self._decoded()
        return "" if text.endswith("\ufffd") else self._new(text)

    def end(self) -> str:
        """What remains, an incomplete character included."""
        return self._new(self._decoded())

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def _new(self, text: str) -> str:
        new, self._given = text[len(self._given) :], text
        return new
