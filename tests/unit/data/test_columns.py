"""Columns of well-known data sets: hints by what they mean, and rows that mean something else refused by name."""

from __future__ import annotations

import pytest

from veneer.data.formats import to_examples
from veneer.data.read import Row
from veneer.errors import DataError

pytestmark = pytest.mark.unit


def _read(**fields):
    return to_examples([Row(fields, "d:1")])


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        ("question answer", "question → prompt, answer → completion"),
        ("id system_prompt question response", "question → prompt, response → completion"),
        ("instruction context response category", "response → output, context → input"),
        ("query response type original_question", "query → prompt, response → completion"),
        ("prompt response", "response → completion"),
        ("id dialogue summary", "dialogue → prompt, summary → completion"),
        ("article highlights id", "article → prompt, highlights → completion"),
        ("idx sentence label", "sentence → text"),
        ("conversations", "conversations → messages"),
        ("promt completion", "promt → prompt"),
    ],
)
def test_hints_go_by_meaning(columns, hint):
    with pytest.raises(DataError) as error:
        _read(**dict.fromkeys(columns.split(), "x"))
    assert str(error.value).endswith(f" Perhaps rename {hint}.")


def test_no_hint_where_none_would_make_a_shape():
    with pytest.raises(DataError, match=r"text needs text\.$"):
        _read(id=1, translation={"en": "a", "fr": "b"})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prompt": "p", "completion": "c", "label": True}, r"^d:1 has a true or false label beside prompt"),
        ({"prompt": "p", "completion": "c", "label": "False"}, "keep the rows whose label is true"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, r"^d:1 is a preference row \(chosen and rejected answers\)"),
        ({"text": "t", "labels": [1, 2], "id": "a"}, r"^d:1 has a list of labels: a text of several classes"),
        ({"text": "t", "labels": 1}, r"^d:1 has text and labels, and .*; rename labels → label"),
        ({"text": "t", "role": "prompter", "parent_id": None}, r"^d:1 is one message of a tree \(text, role, parent"),
    ],
)  # fmt: skip
def test_rows_that_mean_something_else_are_refused_by_name(fields, match):
    with pytest.raises(DataError, match=match):
        _read(**fields)


def test_system_and_history_of_instructions_are_used():
    examples = _read(instruction="c", output="d", system="S", history=[["a", "b"]])
    assert [(m["role"], m["content"]) for m in examples.items[0].messages] == [
        ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
    ]  # fmt: skip
    assert (examples.unused, examples.items[0].answers()) == ([], [2, 4])
    with pytest.raises(DataError, match=r"^d:1: history is not a list of pairs \(question, answer\) of text"):
        _read(instruction="c", output="d", history=["a"])
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    with pytest.raises(DataError, match=r"^d:1 has a column system, and a system message in messages as"):
        _read(messages=talk, system="S")
