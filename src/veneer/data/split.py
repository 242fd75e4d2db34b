"""Training rows and held-out rows: no near-duplicate stands on both sides, and neither side lacks a kind of row."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

from veneer.data.formats import Example, asked_text, labels_in
from veneer.data.kept import those_of
from veneer.errors import DataError

_NO_LETTER = r"[\W\d_]+"
_KIND = (
    "{rows} rows differ from others only in numbers, case or punctuation ({places}), which is a kind of row and not a "
    "repetition: among them only rows with equal questions stay on one side."
)
_ONE_QUESTION = (
    "{rows} rows have the questions of many others ({places}), so these questions are on both sides: only rows with "
    "equal answers, too, stay on one side."
)
_FEW = 4  # rows of a group that may always stay together, where so many are held out


class Split(NamedTuple):
    """Each side in its first order, and what the user should know of the split, as sentences."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    notes: list[str]


def split(examples: Sequence[Example], held_out: float, seed: int, *, classes: bool = False) -> Split:
    """The same for the same seed.

    ``held_out``: a share of the rows when below 1, else a number of them. Rows that differ only in case, numbers,
    punctuation or a "Re:" go to one side together, so the sides may differ by a few rows from that. But a group of more
    than a quarter of the held-out rows would be a kind of row, which both sides need: of these only rows with equal
    questions stay together, and where these are as many, only those with equal answers, too.
    ``classes``: whether answers are the classes of a classifier, of which training keeps a row each.

    Raises DataError when a side would be empty.
    """
    wanted = max(1, round(held_out * len(examples) if held_out < 1 else held_out))
    groups, notes = _groups(examples, max(wanted // 4, min(wanted, _FEW)))
    random.Random(seed).shuffle(groups)
    left = Counter(chain.from_iterable(map(labels_in, examples))) if classes else Counter[str]()
    chosen: set[int] = set()
    for members in groups:
        if len(chosen) >= wanted:
            break
        taken = Counter(name for index in members for name in labels_in(examples[index])) if classes else Counter[str]()
        # One large group must not take the other side's rows, nor a class's last ones.
        if len(chosen) + len(members) < len(examples) and all(left[name] > taken[name] for name in taken):
            chosen.update(members)
            left -= taken
    if not chosen or wanted >= len(examples):
        raise DataError(_impossible(held_out, len(examples), len(groups), wanted, classes))
    counts = Counter(chain.from_iterable(map(labels_in, examples))) if classes else Counter[str]()
    once = sorted(name for name, count in counts.items() if count == 1)
    if once:
        notes.append(
            f"{_counted(once, 'class', 'classes')} once among the rows ({_some(once)}): kept for training, and not "
            f"measured."
        )
    return Split(
        those_of(examples, [index for index in range(len(examples)) if index not in chosen]),
        those_of(examples, sorted(chosen)),
        notes,
    )


def _groups(examples: Sequence[Example], largest: int) -> tuple[list[list[int]], list[str]]:
    """Numbers of the rows that stay together, and a sentence for each kind of group that was divided."""
    groups = _grouped(range(len(examples)), _numbered(examples, _gist))
    notes = []
    for key, what in (
        (asked_text, _KIND),
        (_with_its_answer, _ONE_QUESTION),
    ):
        of_row = _numbered(examples, key)
        whole, divided = [], []
        for members in groups:
            inside = _grouped(members, of_row) if len(members) > largest else []
            whole += inside or [members]
            divided += members if len(inside) > 1 else []
        if divided:
            places = _some(examples[index].where for index in sorted(divided))
            notes.append(what.format(rows=f"{len(divided):,}", places=places))
        groups = sorted(whole)
    return groups, notes


def _numbered(examples: Sequence[Example], key: Callable[[Example], str]) -> Callable[[int], str]:
    return lambda index: key(examples[index])


def _grouped(indices: Iterable[int], key: Callable[[int], str]) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for index in indices:  # what they have in common is as long as the rows, and its digest is not
        groups.setdefault(blake2b(key(index).encode(errors="surrogatepass"), digest_size=16).digest(), []).append(index)
    return list(groups.values())


def _gist(example: Example) -> str:
    """What is left of the question when case, reply marks, numbers and punctuation are taken away."""
    asked = asked_text(example)
    text = re.sub(r"\b(re|fw|fwd):", " ", asked.lower())
    return re.sub(_NO_LETTER, " ", text).strip() or asked


def _with_its_answer(example: Example) -> str:
    return f"{asked_text(example)}\0{example.last_answer()}"


def _impossible(held_out: float, rows: int, differ: int, wanted: int, classes: bool) -> str:
    start = f"held_out = {held_out:g} cannot be split off {rows} rows ({differ} that differ)"
    if differ == 1 and rows > 1:
        return f"{start}, for they are all the same; give other rows, a held-out file, or held_out = 0."
    if wanted < rows and classes:
        return f"{start}, since each class needs one to train on; give more rows, a held-out file, or held_out = 0."
    return f"{start} with rows left to train on; choose a smaller one, or give a held-out file."


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _counted(names: list[str], one: str, several: str) -> str:
    return f"{len(names)} {one} occurs" if len(names) == 1 else f"{len(names)} {several} occur"
