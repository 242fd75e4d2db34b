"""The held-out side: the size asked for, the same for a seed, and no near-duplicate across."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.bbc import bbc_topics
from veneer.data.formats import Example
from veneer.data.split import split
from veneer.errors import DataError

pytestmark = pytest.mark.unit


def _examples(prompts):
    return [Example(f"d:{i}", prompt=prompt, answer="a") for i, prompt in enumerate(prompts)]


WORDS = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]


def test_share_and_number_and_seed():
    examples = _examples(WORDS)
    assert [len(side) for side in split(examples, 0.2, seed=0)] == [80, 20]
    assert [len(side) for side in split(examples, 30, seed=0)] == [70, 30]
    assert split(examples, 30, seed=0) == split(examples, 30, seed=0)
    assert split(examples, 30, seed=0) != split(examples, 30, seed=1)


@given(
    st.lists(st.sampled_from(["a b", "A  B!", "Re: a b", "a b 2", "c", "d", "1", "2"]), min_size=4), st.integers(0, 5)
)
def test_near_duplicates_stay_together(prompts, seed):
    same = {"a b": 0, "A  B!": 0, "Re: a b": 0, "a b 2": 0}
    try:
        train, held_out = split(_examples(prompts), 0.4, seed)
    except DataError:
        assert len({same.get(p, p) for p in prompts}) == 1
        return
    if {same.get(p, p) for p in prompts} == {0}:
        same = {"a b": 0, "A  B!": 0, "Re: a b": 0}  # where numbers alone tell rows apart, they count
    assert not {same.get(e.prompt, e.prompt) for e in train} & {same.get(e.prompt, e.prompt) for e in held_out}
    assert len(train) + len(held_out) == len(prompts)


def test_an_empty_side_is_refused():
    with pytest.raises(DataError, match=r"held_out = 0.1 cannot be split off 3 rows \(1 that differ\)"):
        split(_examples(["x", "X", "x!"]), 0.1, seed=0)


def test_conversations_and_texts_are_told_apart_by_what_is_asked():
    talk = [Example(f"d:{i}", messages=({"role": "user", "content": q},)) for i, q in enumerate("aAbcd")]
    train, held_out = split(talk, 2, seed=0)
    assert len(train) + len(held_out) == 5


def test_bbc_topics():
    rows = bbc_topics()
    assert len(rows) == 2096
    assert {fields["completion"] for fields, _ in rows} == {
        " business", " entertainment", " politics", " sports", " tech",
    }  # fmt: skip


def test_rows_that_differ_in_numbers_alone_can_be_split():
    sums = [Example(f"d:{i}", prompt=f"What is {i} + {j}?", answer=str(i + j)) for i in range(10) for j in range(10)]
    train, held_out = split(sums + sums[:3], 0.1, 0)
    assert len(held_out) in (10, 11)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}, "equal ones stay together"
