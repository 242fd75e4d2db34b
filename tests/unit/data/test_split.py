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
    assert [len(side) for side in split(examples, 0.2, seed=0)[:2]] == [80, 20]
    assert [len(side) for side in split(examples, 30, seed=0)[:2]] == [70, 30]
    assert split(examples, 30, seed=0) == split(examples, 30, seed=0)
    assert split(examples, 30, seed=0) != split(examples, 30, seed=1)


@given(
    st.lists(st.sampled_from(["a b", "A  B!", "Re: a b", "a b 2", "c", "d", "1", "2"]), min_size=4), st.integers(0, 5)
)
def test_near_duplicates_stay_together(prompts, seed):
    same = {"a b": 0, "A  B!": 0, "Re: a b": 0, "a b 2": 0}
    wanted = max(1, round(0.4 * len(prompts)))
    if sum(prompt in same for prompt in prompts) > max(wanted // 4, min(wanted, 4)):
        same = {}  # so many that they are a kind of row: then equal ones alone stay together
    try:
        train, held_out, _ = split(_examples(prompts), 0.4, seed)
    except DataError:
        assert len({same.get(p, p) for p in prompts}) == 1
        return
    assert not {same.get(e.prompt, e.prompt) for e in train} & {same.get(e.prompt, e.prompt) for e in held_out}
    assert len(train) + len(held_out) == len(prompts)


def test_rows_that_are_all_the_same_are_refused():
    with pytest.raises(
        DataError,
        match=r"^held_out = 0.1 cannot be split off 3 rows \(1 that differ\), for they are all the same",
    ):
        split(_examples(["x", "x", "x"]), 0.1, seed=0)
    with pytest.raises(DataError, match=r"off 3 rows \(3 that differ\) with rows left to train on; choose a smaller"):
        split(_examples(["x", "y", "z"]), 3, seed=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_kind_of_row_is_on_both_sides(seed):
    """Sums differ in their numbers alone: those of one sort must not all be held out."""
    sums = [f"{('Add', 'Multiply')[i % 2]} {i} and {i % 7}:" for i in range(400)]
    train, held_out, notes = split(_examples(sums), 0.1, seed)
    assert len(held_out) == 40
    assert {example.prompt.split()[0] for example in train} == {"Add", "Multiply"}
    assert {example.prompt.split()[0] for example in held_out} == {"Add", "Multiply"}
    assert notes == [
        "400 rows differ from others only in numbers, case or punctuation (d:0, d:1, d:2, …), which is a kind of row "
        "and not a repetition: among them only rows with equal questions stay on one side."
    ]


def test_rows_of_a_table_as_text():
    people = [
        f"Sex: {sex}, class: {rank}, age: {20 + i}, fare: {i}.25. Survived?"
        for i in range(100) for sex in ("male", "female") for rank in ("first", "second", "third")
    ]  # fmt: skip
    train, held_out, _ = split(_examples(people), 0.1, seed=0)
    assert (len(train), len(held_out)) == (540, 60)
    assert len({tuple(example.prompt.split(",")[:2]) for example in held_out}) == 6


def test_where_all_rows_have_one_prompt_their_answers_count():
    haikus = [Example(f"d:{i}", prompt="Write a haiku.", answer=f"haiku {i // 2}") for i in range(30)]
    train, held_out, notes = split(haikus, 0.2, seed=0)
    assert len(held_out) == 6
    assert not {e.answer for e in train} & {e.answer for e in held_out}, "equal ones stay together"
    assert notes == [
        "30 rows have the questions of many others (d:0, d:1, d:2, …), so these questions are on both sides: only rows "
        "with equal answers, too, stay on one side."
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_row_of_each_class_is_kept_for_training(seed):
    rows = [Example(f"d:{i}", prompt=WORDS[i], answer="ab"[i % 2]) for i in range(40)]
    rows += [Example("d:40", prompt="rare", answer="c"), Example("d:41", prompt="rare too", answer="d")]
    train, held_out, notes = split(rows, 0.5, seed, classes=True)
    assert {example.answer for example in train} == set("abcd")
    assert {example.answer for example in held_out} == set("ab")
    assert notes == ["2 classes occur once among the rows (c, d): kept for training, and not measured."]


def test_conversations_and_texts_are_told_apart_by_what_is_asked():
    talk = [Example(f"d:{i}", messages=({"role": "user", "content": q},)) for i, q in enumerate("aAbcd")]
    train, held_out, _ = split(talk, 2, seed=0)
    assert len(train) + len(held_out) == 5


def test_bbc_topics():
    rows = bbc_topics()
    assert len(rows) == 2096
    assert {fields["completion"] for fields, _ in rows} == {
        " business", " entertainment", " politics", " sports", " tech",
    }  # fmt: skip


def test_rows_that_differ_in_numbers_alone_can_be_split():
    sums = [Example(f"d:{i}", prompt=f"What is {i} + {j}?", answer=str(i + j)) for i in range(10) for j in range(10)]
    train, held_out, _ = split(sums + sums[:3], 0.1, 0)
    assert len(held_out) in (10, 11)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}, "equal ones stay together"
