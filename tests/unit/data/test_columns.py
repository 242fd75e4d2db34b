"""Columns of well-known data sets: hints by what they mean, and rows that mean something else refused by name."""

from __future__ import annotations

import pytest

from veneer.data.columns import SHAPES
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


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
HUMAN = "\n\nHuman: q\n\nAssistant: "
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
# Well-known sets by their columns: the shape that they are taken as, or what the refusal says.
SETS = {
    "alpaca": ({"instruction": "a", "input": "", "output": "b", "text": "c"}, "fit several shapes: instruction/output"),
    "alpaca-cleaned": ({"instruction": "a", "input": "", "output": "b"}, "instruction/output"),
    "dolly": ({"instruction": "a", "context": "", "response": "b", "category": "c"}, "response → output, context"),
    "OpenOrca": ({"id": "1", "system_prompt": "s", "question": "a", "response": "b"}, "question → prompt, response"),
    "ShareGPT": ({"conversations": SHAREGPT}, r"is in ShareGPT's form; write it as messages"),
    "ultrachat": ({"prompt": "a", "prompt_id": "1", "messages": TALK}, "messages"),
    "smoltalk": ({"messages": TALK, "source": "s"}, "messages"),
    "oasst1": ({"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"}, "is one message of a tree"),
    "gsm8k": ({"question": "a", "answer": "b"}, "rename question → prompt, answer → completion"),
    "squad": ({"id": "1", "title": "t", "context": "c", "question": "a", "answers": {"text": ["b"]}}, "fit no shape"),
    "sst2": ({"idx": 0, "sentence": "a", "label": 1}, "rename sentence → text"),
    "imdb": ({"text": "a", "label": "neg"}, "text/label"),
    "go_emotions": ({"text": "a", "labels": [1], "id": "1"}, "has a list of labels"),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, "which fit no shape"),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 0.5, "idx": 0}, "which fit no shape"),
    "samsum": ({"id": "1", "dialogue": "a", "summary": "b"}, "dialogue → prompt, summary → completion"),
    "cnn_dailymail": ({"article": "a", "highlights": "b", "id": "1"}, "article → prompt, highlights → completion"),
    "xsum": ({"document": "a", "summary": "b", "id": "1"}, "document → prompt, summary → completion"),
    "wikitext": ({"text": "a"}, "text"),
    "c4": ({"text": "a", "timestamp": "t", "url": "u"}, "text"),
    "no_robots": ({"prompt": "a", "prompt_id": "1", "messages": TALK, "category": "c"}, "messages"),
    "hh-rlhf": ({"chosen": HUMAN + "a", "rejected": HUMAN + "b"}, "chosen/rejected"),
    "ultrafeedback": ({"prompt": "a", "chosen": TALK, "rejected": TALK, "score_chosen": 1.0}, "chosen/rejected"),
    "orca_dpo_pairs": ({"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, "no prompt; .* question"),
    "kto-mix": ({"prompt": TALK[:1], "completion": TALK[1:], "label": True}, "prompt/completion/label"),
    "glaive": ({"system": "s", "chat": "USER: a"}, "which fit no shape"),
    "xlam": ({"query": "a", "tools": "[]", "answers": "[]"}, "query → prompt, answers → completion"),
    "MetaMathQA": ({"query": "a", "response": "b", "type": "t", "original_question": "q"}, "query → prompt, response"),
    "opus_books": ({"id": "1", "translation": {"en": "a", "fr": "b"}}, "which fit no shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_the_columns_of_well_known_sets_are_taken_or_refused_for_a_reason(name):
    fields, expected = SETS[name]
    if expected in SHAPES:
        assert _read(**fields).shape == expected
        return
    with pytest.raises(DataError, match=expected):
        _read(**fields)
