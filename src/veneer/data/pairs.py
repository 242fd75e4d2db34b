"""Rows with preferences → tokens: two answers to a prompt, each after the prompt's tokens and compared as one row.

The tokens are kept as those of other rows are, in a file where they are many.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy
from numpy.typing import NDArray

from veneer.data.formats import Example
from veneer.data.labels import IGNORE, Renderer, Tokens
from veneer.data.report import Report
from veneer.data.token_rows import TokenRows, lengths_of
from veneer.errors import DataError

Watched = Callable[[Sequence[Example]], Iterable[Example]]  # hands rows out one by one, and shows how far it is

_VERDICTS = (None, False, True)  # of an answer, by the number that it is kept as


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
    def of(cls, first: Tokens, second: Tokens, desirable: bool | None = None, number: int = 0) -> Pair:
        """The two as one row."""
        ids, labels = first.ids + second.ids, first.labels + second.labels
        return cls(ids, labels, first.where, len(first.ids), number, desirable)

    @property
    def first(self) -> Tokens:
        """The chosen answer; or the one answer."""
        return Tokens(self.ids[: self.border], self.labels[: self.border], self.where)

    @property
    def second(self) -> Tokens:
        """The rejected answer; or another row's."""
        return Tokens(self.ids[self.border :], self.labels[self.border :], self.where)

    @property
    def content(self) -> tuple[object, ...]:
        return *super().content, self.border, self.desirable


class PairRows(TokenRows):
    """`TokenRows` of pairs alone."""

    def __init__(self, rows: Iterable[Tokens] = ()) -> None:
        self._borders, self._numbers, self._verdicts = array("i"), array("q"), array("b")
        super().__init__(rows)

    def append(self, row: Tokens) -> None:
        assert isinstance(row, Pair)
        super().append(row)
        self._borders.append(row.border)
        self._numbers.append(row.number)
        self._verdicts.append(_VERDICTS.index(row.desirable))

    @property
    def borders(self) -> NDArray[numpy.int32]:
        """(rows,): where each row's second sequence begins."""
        return numpy.array(self._borders, dtype=numpy.int32)

    def _columns(self) -> tuple[array[int], ...]:
        return *super()._columns(), self._borders, self._numbers, self._verdicts

    def _row(self, number: int) -> Pair:
        row, verdict = super()._row(number), _VERDICTS[self._verdicts[number]]
        return Pair(row.ids, row.labels, row.where, self._borders[number], self._numbers[number], verdict)


def sequences(row: Tokens) -> list[Tokens]:
    """What of a row passes through the model by itself: of a pair, either answer."""
    return [row.first, row.second] if isinstance(row, Pair) else [row]


def borders_of(rows: Sequence[Tokens]) -> NDArray[numpy.int32]:
    """(rows,): where each row's second sequence begins; 0 of a row that is one sequence."""
    if isinstance(rows, PairRows):
        return rows.borders
    if isinstance(rows, TokenRows):
        return numpy.zeros(len(rows), numpy.int32)
    return numpy.array([row.border if isinstance(row, Pair) else 0 for row in rows], numpy.int32)


def longest_sequence(rows: Sequence[Tokens]) -> int:
    """The most tokens of a row that pass through the model by themselves."""
    lengths, borders = lengths_of(rows), borders_of(rows)
    return int(numpy.maximum(borders, lengths - borders).max())


def to_pairs(
    renderer: Renderer, examples: Sequence[Example], first: int = 0, watched: Watched = iter
) -> tuple[PairRows, Report]:
    """The chosen and the rejected answer of each example, numbered from ``first``; and what became of the others: pairs
    of which a side has nothing to learn, or whose sides are the same.

    Raises DataError when none is left.
    """
    report, pairs = Report(rows=len(examples)), PairRows()
    for example in watched(examples):
        assert example.rejected is not None
        chosen, rejected = (_one(renderer, side, report) for side in (example, example.rejected))
        if chosen is None or rejected is None:
            _leave_out(example, report)
        elif chosen.ids == rejected.ids:
            report.alike.append(example.where)
        else:
            pairs.append(Pair.of(chosen, rejected, number=first + len(pairs)))
    _refuse_none(pairs, renderer, examples)
    return pairs, report


def to_judged(
    renderer: Renderer, examples: Sequence[Example], first: int = 0, watched: Watched = iter
) -> tuple[PairRows, Report]:
    """The answer of each example, and beside it the answer of the row before to the same prompt: of the nearest row
    with another prompt, since an answer to the same one would be no mismatch. A row with two answers becomes two.

    Raises DataError when fewer than two rows are left.
    """
    report, rows, desirable = Report(rows=len(examples)), TokenRows(), list[bool]()
    for example in (answer for row in watched(examples) for answer in _singles(row)):
        tokens = _one(renderer, example, report)
        if tokens is None:
            _leave_out(example, report)
        else:
            rows.append(tokens)
            desirable.append(bool(example.desirable))
    if len(rows) == 1:
        raise DataError(
            f"{rows[0].where} is the only row on its side; KTO measures it against the answers of others: give more "
            f"rows, or held_out = 0."
        )
    pairs = PairRows()
    for tokens, other, good in zip(rows, _others(rows), desirable, strict=True):
        mismatched = _mismatched(tokens, rows[other], renderer.max_length)
        pairs.append(Pair.of(tokens, mismatched, good, first + len(pairs)))
    _refuse_none(pairs, renderer, examples)
    return pairs, report


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


def _leave_out(example: Example, report: Report) -> None:
    if example.where not in report.dropped[-1:]:  # which says so already
        report.left_out.append(example.where)


def _refuse_none(pairs: PairRows, renderer: Renderer, examples: Sequence[Example]) -> None:
    if not len(pairs):
        raise DataError(
            f"None of the {len(examples)} rows has answers to compare within max_length = {renderer.max_length}; the "
            f"first is {examples[0].where}. Are the answers empty or the same, or the prompts longer than that?"
        )


def _others(rows: Sequence[Tokens]) -> list[int]:
    """For each row the number of the nearest row before it that has another prompt; the last rows come before the
    first. Where all prompts are equal, of the row before it."""
    prompts = [blake2b(array("q", row.ids[: _parted(row)]), digest_size=16).digest() for row in rows]
    of_first = next((place for place in range(len(rows) - 1, 0, -1) if prompts[place] != prompts[0]), None)
    if of_first is None:
        return [number - 1 for number in range(len(rows))]
    others = [of_first]
    for number in range(1, len(rows)):
        others.append(number - 1 if prompts[number - 1] != prompts[number] else others[-1])
    return others


def _mismatched(row: Tokens, other: Tokens, max_length: int) -> Tokens:
    """The prompt of a row, and the answer of another."""
    start, of_other = _parted(row), _parted(other)
    ids = row.ids[:start] + other.ids[of_other:]
    labels = row.labels[:start] + other.labels[of_other:]
    return Tokens(ids[:max_length], labels[:max_length], row.where)


def _parted(row: Tokens) -> int:
    """The place of the first token that is learned."""
    return next(place for place, label in enumerate(row.labels) if label != IGNORE)
