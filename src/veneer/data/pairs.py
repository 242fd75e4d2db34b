"""Rows with preferences → tokens: two answers to a prompt, each after the prompt's tokens and compared as one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from veneer.data.formats import Example
from veneer.data.labels import IGNORE, Renderer, Tokens
from veneer.data.report import Report
from veneer.errors import DataError


@dataclass(frozen=True)
class Pair(Tokens):
    """Two sequences of one row, back to back in ``ids`` and ``labels``: the second begins at ``border``.

    The chosen answer and the rejected one; or, where ``desirable`` says whether it is good, an answer to its prompt and
    another row's answer to the same prompt, which KTO estimates its divergence from. ``number``: the row's, of all rows
    of the run, by which its reference is found.
    """

    border: int = 0
    number: int = 0
    desirable: bool | None = None

    @classmethod
    def of(cls, first: Tokens, second: Tokens, desirable: bool | None = None) -> Pair:
        """The two as one row."""
        ids, labels = first.ids + second.ids, first.labels + second.labels
        return cls(ids, labels, first.where, len(first.ids), desirable=desirable)

    @property
    def first(self) -> Tokens:
        """The chosen answer; or the one answer."""
        return Tokens(self.ids[: self.border], self.labels[: self.border], self.where)

    @property
    def second(self) -> Tokens:
        """The rejected answer; or another row's."""
        return Tokens(self.ids[self.border :], self.labels[self.border :], self.where)


def sequences(row: Tokens) -> list[Tokens]:
    """What of a row passes through the model by itself: of a pair, either answer."""
    return [row.first, row.second] if isinstance(row, Pair) else [row]


def to_pairs(renderer: Renderer, examples: list[Example], first: int = 0) -> tuple[list[Tokens], Report]:
    """The chosen and the rejected answer of each example, numbered from ``first``; and what became of the others: pairs
    of which a side has nothing to learn, or whose sides are the same.

    Raises DataError when none is left.
    """
    report, pairs = Report(rows=len(examples)), list[Pair]()
    for example in examples:
        assert example.rejected is not None
        chosen, rejected = (_one(renderer, side, report) for side in (example, example.rejected))
        if chosen is None or rejected is None:
            report.left_out.append(example.where)
        elif chosen.ids == rejected.ids:
            report.alike.append(example.where)
        else:
            pairs.append(Pair.of(chosen, rejected))
    return _numbered(pairs, report, first, renderer.max_length, examples)


def to_judged(renderer: Renderer, examples: list[Example], first: int = 0) -> tuple[list[Tokens], Report]:
    """The answer of each example, and beside it the answer of the row before to the same prompt: of the nearest row
    with another prompt, since an answer to the same one would be no mismatch. A row with two answers becomes two.

    Raises DataError when fewer than two rows are left.
    """
    report, rows = Report(rows=len(examples)), []
    for example in (answer for row in examples for answer in _singles(row)):
        tokens = _one(renderer, example, report)
        if tokens is None:
            report.left_out.append(example.where)
        else:
            rows.append((tokens, bool(example.desirable)))
    if len(rows) == 1:
        raise DataError(
            f"{rows[0][0].where} is the only row on its side; KTO measures it against the answers of others: give more "
            f"rows, or held_out = 0."
        )
    others = _mismatched([tokens for tokens, _ in rows], renderer.max_length)
    pairs = [Pair.of(tokens, other, good) for (tokens, good), other in zip(rows, others, strict=True)]
    return _numbered(pairs, report, first, renderer.max_length, examples)


def _singles(example: Example) -> list[Example]:
    """The answers of an example, one by one, each with whether it is good."""
    if example.rejected is None:
        return [example]
    return [replace(example, rejected=None, desirable=True), replace(example.rejected, desirable=False)]


def _one(renderer: Renderer, example: Example, report: Report) -> Tokens | None:
    """The tokens of an answer; None where there is nothing to learn. Raises DataError for several answers that cannot
    be in one row."""
    whole = [row for row in renderer.cut_rows(example, report) if row.learned]
    if len(whole) > 1:
        raise DataError(
            f"{example.where} has {len(whole)} answers after what is asked, and the chat template changes earlier "
            f"turns, so they are no one text to compare; give learn: last."
        )
    if not whole:
        return None
    report.learned += whole[0].learned
    return whole[0]


def _numbered(
    pairs: list[Pair], report: Report, first: int, max_length: int, examples: list[Example]
) -> tuple[list[Tokens], Report]:
    if not pairs:
        raise DataError(
            f"None of the {len(examples)} rows has answers to compare within max_length = {max_length}; the first is "
            f"{examples[0].where}. Are the answers empty or the same, or the prompts longer than that?"
        )
    return [replace(pair, number=first + place) for place, pair in enumerate(pairs)], report


def _mismatched(rows: Sequence[Tokens], max_length: int) -> list[Tokens]:
    """For each row its prompt and the answer of the nearest row before it that has another prompt; the last rows come
    before the first. Where all prompts are equal, the answer of the row before it."""
    parts = [_parted(row) for row in rows]
    prompts = [tuple(row.ids[:start]) for row, start in zip(rows, parts, strict=True)]
    made = []
    for number, row in enumerate(rows):
        others = (place % len(rows) for place in range(number - 1, number - len(rows), -1))
        other = next((place for place in others if prompts[place] != prompts[number]), number - 1)
        ids = row.ids[: parts[number]] + rows[other].ids[parts[other] :]
        labels = row.labels[: parts[number]] + rows[other].labels[parts[other] :]
        made.append(Tokens(ids[:max_length], labels[:max_length], row.where))
    return made


def _parted(row: Tokens) -> int:
    """The place of the first token that is learned."""
    return next(place for place, label in enumerate(row.labels) if label != IGNORE)
