"""Rows of more tokens than a row may have: cut, left out, or in pieces."""

from __future__ import annotations

from typing import Literal

LongRows = Literal["auto", "cut", "cut-front", "split", "drop"]


def cut_at_the_end(ids: list[int], limit: int, kept_at_the_end: int) -> list[int]:
    """The first ``limit`` tokens, of which the last ``kept_at_the_end`` are those of the whole.

    >>> cut_at_the_end([1, 2, 3, 4, 9], 3, 1)
    [1, 2, 9]
    """
    kept = kept_at_the_end if len(ids) > limit else 0
    return [*ids[: limit - kept], *ids[len(ids) - kept :]] if kept else ids[:limit]


def cut_at_the_front(ids: list[int], limit: int, kept_at_the_front: int) -> list[int]:
    """The last ``limit`` tokens, of which the first ``kept_at_the_front`` are those of the whole.

    >>> cut_at_the_front([1, 2, 3, 4, 9], 3, 1)
    [1, 4, 9]
    """
    kept = kept_at_the_front if len(ids) > limit else 0
    return [*ids[:kept], *ids[max(0, len(ids) - limit + kept) :]]


def in_pieces(ids: list[int], labels: list[int], limit: int) -> list[tuple[list[int], list[int]]]:
    """Pieces of ``limit`` tokens in their order. The first token of each has nothing before it to be learned from, so
    that the last piece takes one of the piece before, where it would be alone.

    >>> in_pieces([1, 2, 3, 4], [-100, 2, 3, 4], 3)
    [([1, 2], [-100, 2]), ([3, 4], [3, 4])]
    """
    starts = list(range(0, len(ids), limit))
    if limit > 2 and len(starts) > 1 and len(ids) - starts[-1] == 1:
        starts[-1] -= 1
    borders = zip(starts, [*starts[1:], len(ids)], strict=True)
    return [(ids[start:end], labels[start:end]) for start, end in borders]
