"""Training rows and held-out rows, so that no near-duplicate stands on both sides."""

from __future__ import annotations

import random
import re

from veneer.data.formats import Example
from veneer.errors import DataError

_NO_LETTER = r"[\W\d_]+"
_NO_SUM = r"(?:(?![\d+*/<>=-])[\W_])+"


def split(examples: list[Example], held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples, each in their first order; the same for the same seed.

    ``held_out``: a share of the rows when below 1, else a number of them. Rows that differ only in case,
    numbers, punctuation or a "Re:" go to one side together, so the sides may differ by a few rows from that.

    Raises DataError when a side would be empty.
    """
    wanted = max(1, round(held_out * len(examples) if held_out < 1 else held_out))
    groups = _grouped([_gist(example) for example in examples])
    if len(groups) == 1:
        # Rows that differ in their numbers and signs alone, sums say: there these are what is asked.
        groups = _grouped([_gist(example, _NO_SUM) for example in examples])
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for members in order:
        if len(chosen) >= wanted:
            break
        if len(chosen) + len(members) < len(examples):  # one large group must not take the other side's rows
            chosen.update(members)
    if not chosen or wanted >= len(examples):
        raise DataError(
            f"held_out = {held_out:g} cannot be split off {len(examples)} rows ({len(groups)} that differ) with rows "
            f"left to train on; choose a smaller one, or give a held-out file."
        )
    return (
        [example for index, example in enumerate(examples) if index not in chosen],
        [example for index, example in enumerate(examples) if index in chosen],
    )


def _grouped(keys: list[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups


def _asked(example: Example) -> str:
    """The question: all that is not the last answer; of a plain text, the text."""
    if example.messages:
        return " ".join(message["content"] for message in example.messages[:-1]) or example.messages[-1]["content"]
    return example.prompt if example.prompt is not None else example.answer


def _gist(example: Example, dropped: str = _NO_LETTER) -> str:
    """What is left of the question when case, reply marks and what matches ``dropped`` are taken away."""
    asked = _asked(example)
    text = re.sub(r"\b(re|fw|fwd):", " ", asked.lower())
    return re.sub(dropped, " ", text).strip() or asked
