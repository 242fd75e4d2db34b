"""Text as it is generated, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from veneer.data.labels import Renderer
from veneer.generation.session import Session
from veneer.generation.text import Text


def pieces(
    model: Any,
    renderer: Renderer,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    **how: Any,
) -> Iterator[str]:
    """The text after a prompt (token ids), without special tokens, in pieces as they come; the same text as
    `continuations` gives. ``how``: the other options that `Session.add` takes. Raises as that does, before the first
    piece."""
    session, stops = Session(model, renderer), [stop] if isinstance(stop, str) else list(stop)
    key = session.add(prompt, max_new_tokens=max_new_tokens, stop=stops, **how)
    return _pieces(session, key, Text(renderer.tokenizer, stops))


def _pieces(session: Session, key: int, text: Text) -> Iterator[str]:
    ended = False
    while not ended:
        (added,) = session.step()
        ended = added.ended
        if piece := text.put(added.token):
            yield piece
    if rest := text.end():
        yield rest
