"""What became of rows on their way to tokens, as sentences for a person."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.data.formats import counted_rows
from veneer.data.template import Rendered


@dataclass
class Report:
    """What happened to rows on their way to tokens: nothing is left out or cut without being counted here."""

    rows: int = 0
    learned: int = 0
    cut_at: str = "end"  # or front
    tokens: int = 0  # of all rows, whole
    lost: int = 0  # of these, the ones of what was cut away or left out
    cut: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # since they are too long
    divided: list[str] = field(default_factory=list)  # plain texts that became pieces
    pieces: int = 0  # and how many these became
    left_out: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)  # of those, the ones that have no answer at any length
    split: list[str] = field(default_factory=list)  # rows that became a row an answer
    parts: int = 0  # and how many these became
    unasked: list[str] = field(default_factory=list)  # rows with an answer before any question
    missing: dict[str, list[str]] = field(default_factory=dict)  # what the template leaves out → of which rows
    unused_keys: dict[str, None] = field(default_factory=dict)  # of messages
    alike: list[str] = field(default_factory=list)  # rows whose chosen and rejected answers are the same tokens
    marked: list[str] = field(default_factory=list)  # texts that bring special tokens of their own
    markers: dict[str, None] = field(default_factory=dict)  # which

    def saw(self, where: str, rendered: Rendered) -> None:
        """Count what a template did to a conversation."""
        if rendered.split:
            self.split.append(where)
            self.parts += len(rendered.rows)
        if rendered.unasked:
            self.unasked.append(where)
        for what in rendered.missing:
            self.missing.setdefault(what, []).append(where)
        self.unused_keys |= dict.fromkeys(rendered.unused_keys)

    def sentences(self, max_length: int) -> list[str]:
        """One sentence for each thing the user should know; none when all rows went through whole."""
        sentences = []
        if self.split:
            sentences.append(
                f"{counted_rows(self.split)} became {self.parts}, one for each answer: the chat template changes "
                f"earlier turns once others follow, so each answer comes after the text that the model will see."
            )
        if self.unasked:
            sentences.append(
                f"{counted_rows(self.unasked)} with an answer before any question, which is given and not learned."
            )
        for what, where in self.missing.items():
            sentences.append(f"The chat template leaves out {what} of {counted_rows(where)}.")
        if self.unused_keys:
            sentences.append(f"Keys of messages that the chat template does not use: {', '.join(self.unused_keys)}.")
        if self.marked:
            sentences.append(
                f"{counted_rows(self.marked)} with special tokens in the text ({', '.join(self.markers)}), as if "
                f"rendered already: begin and end tokens are added only where they are missing."
            )
        longer = f"longer than max_length = {max_length} tokens"
        if self.divided:
            sentences.append(f"{counted_rows(self.divided)} {longer}: learned in {self.pieces:,} pieces.")
        if self.cut:
            sentences.append(f"{counted_rows(self.cut)} {longer}: cut at the {self.cut_at}.")
        if self.dropped:
            sentences.append(f"{counted_rows(self.dropped)} {longer}: left out.")
        if self.empty:
            them = "it" if len(self.empty) == 1 else "them"
            sentences.append(f"{counted_rows(self.empty)} left out, because there is no answer to learn in {them}.")
        if self.alike:
            sentences.append(
                f"{counted_rows(self.alike)} left out, because chosen and rejected are the same within max_length = "
                f"{max_length} tokens."
            )
        empty = set(self.empty)
        if too_long := [where for where in self.left_out if where not in empty]:
            sentences.append(
                f"{counted_rows(too_long)} left out, because no token to learn remains within max_length = "
                f"{max_length}."
            )
        if self.lost:
            share = 100 * self.lost / self.tokens
            much = f"{share:.1f} %" if share >= 0.1 else "less than 0.1 %"
            sentences.append(f"{much} of all tokens are in what was cut or left out.")
        return sentences
