"""Texts that follow one another → the tokens of each apart, in time that grows with the text and not with its square.

Some tokenizers (Llama 2's) put a space before all that they are given, so a later text's tokens are what it adds to
those of the texts before it. Encoding all of these again for each text made a conversation of 160 exchanges cost a
hundred times its tokens. But a tokenizer's added tokens ("<|im_start|>") divide a text before anything else happens to
it: what stands before such a token is encoded alike, whatever comes after it. So a text is encoded together with what
is before it from the last such token on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import BatchEncoding


class Turns:
    """The texts of conversations as a tokenizer's tokens; ``encode``: its encoding of a text, without begin and end
    tokens."""

    def __init__(self, tokenizer: Any, encode: Callable[[str], BatchEncoding]) -> None:
        self.encoded = encode
        added = getattr(tokenizer, "added_tokens_decoder", {})
        # Those that are looked for in a text before it is normalised, wherever they stand.
        self.dividing = {token for token, kind in added.items() if not (kind.normalized or kind.single_word)}
        self.longest = max((len(kind.content) for kind in added.values()), default=0)

    def encode(self, texts: tuple[str, ...]) -> list[list[int]]:
        """The tokens that each text adds to those of the texts before it. Only where it would change these, a token
        across the border, are they the text's own."""
        before, pieces = _Before(self), []
        for text in texts:
            added = before.added_by(text)
            pieces.append(before.give(self.encoded(text).input_ids if added is None else added))
        return pieces


class _Before:
    """The texts so far, and the tokens that they were given: both from the last place that divides them on."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._text = ""
        self._given: list[int] = []
        self._apart = False  # whether the tokens of all texts differ from those given, whatever follows
        self._whole: BatchEncoding | None = None  # of the text

    def added_by(self, text: str) -> list[int] | None:
        """None where the tokens of all texts do not begin with those that the texts before were given."""
        if self._apart:
            return None
        self._text += text
        self._whole = self._turns.encoded(self._text)
        ids: list[int] = self._whole.input_ids
        count = len(self._given)
        return ids[count:] if ids[:count] == self._given else None

    def give(self, piece: list[int]) -> list[int]:
        """Note what the latest text was given."""
        if self._apart or self._whole is None:
            return piece
        self._given = self._given + piece
        token, place = self._last_division(self._whole)
        if token:
            self._apart = self._given[:token] != self._whole.input_ids[:token]
            self._text, self._given = self._text[place:], self._given[token:]
        return piece

    def _last_division(self, whole: BatchEncoding) -> tuple[int, int]:
        """The last token that divides the text, and its place in the text; (0, 0) where none does."""
        if not self._turns.dividing or not whole.is_fast:
            return 0, 0
        # Nearer to the end, what follows could make a longer added token of it.
        end, ids = len(self._text) - self._turns.longest, whole.input_ids
        for token in range(len(ids) - 1, 0, -1):
            if ids[token] in self._turns.dividing and (place := whole.token_to_chars(token).start) < end:
                return token, place
        return 0, 0
