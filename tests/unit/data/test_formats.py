"""Recognising the shape of rows, and refusing those that have none or several."""

from __future__ import annotations

import pytest

from veneer.data.formats import SHAPES, to_examples
from veneer.data.read import Row
from veneer.errors import DataError

pytestmark = pytest.mark.unit


def _rows(*fields):
    return [Row(f, f"d.jsonl:{number}") for number, f in enumerate(fields, start=1)]


def _one(**fields):
    examples = to_examples(_rows(fields))
    return examples.shape, examples.items[0]


def test_each_shape():
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    shape, example = _one(messages=talk)
    assert (shape, example.messages) == ("messages", tuple(talk))
    shape, example = _one(prompt="p", completion="c")
    assert (shape, example.prompt, example.answer) == ("prompt/completion", "p", "c")
    shape, example = _one(prompt=talk[:1], completion=talk[1:])
    assert (example.messages, example.given) == (tuple(talk), 1)
    shape, example = _one(instruction="do", input="this", output="done")
    assert (shape, example.messages[0]["content"]) == ("instruction/output", "do\n\nthis")
    assert _one(instruction="do", input="", output="done")[1].messages[0]["content"] == "do"
    shape, example = _one(text="t")
    assert (shape, example.prompt, example.answer) == ("text", None, "t")
    shape, example = _one(text="t", label=3)
    assert (shape, example.prompt, example.answer) == ("text/label", "t\n", "3")


def test_columns_that_are_not_used_are_told():
    examples = to_examples(_rows({"text": "a", "id": 1}, {"text": "b", "url": "u"}))
    assert examples.unused == ["id", "url"]


def test_no_shape_fits():
    with pytest.raises(DataError) as error:
        to_examples(_rows({"promt": "p", "response": "r"}))
    message = str(error.value)
    assert "d.jsonl:1 has the columns promt, response, which fit no shape" in message
    for name, (needed, _) in SHAPES.items():
        assert f"{name} needs {' and '.join(needed)}" in message
    assert message.endswith(" Perhaps --columns prompt=promt,completion=response.")


def test_several_shapes_fit():
    with pytest.raises(
        DataError, match=r"columns prompt, completion, text, which fit several shapes: prompt/completion, "
    ):
        to_examples(_rows({"prompt": "p", "completion": "c", "text": "t"}))


@pytest.mark.parametrize(
    ("second", "match"),
    [
        ({"prompt": "p"}, r"d.jsonl:2 has no completion \(its columns: prompt\)"),
        ({"prompt": "p", "completion": None}, r"d.jsonl:2 has no completion"),
        ({"prompt": [3], "completion": "c"}, r"d.jsonl:2: prompt is a list, not text"),
        ({"prompt": 0.5, "completion": "c"}, r"d.jsonl:2: prompt is a number with a fraction, not text"),
        ({"prompt": "a \ud83d", "completion": "c"}, r"d.jsonl:2: prompt has '.ud83d' as its character 3, half of a"),
    ],
)
def test_bad_rows_name_file_and_line(second, match):
    with pytest.raises(DataError, match=match):
        to_examples(_rows({"prompt": "p", "completion": "c"}, second))


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "messages is not a list of messages"),
        (["hi"], "message 1 of messages is not an object with role and content"),
        (
            [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}],
            r"message 2 .*Did you mean 'assistant'",
        ),
    ],
)
def test_bad_conversations(messages, match):
    with pytest.raises(DataError, match=match):
        to_examples(_rows({"messages": messages}))


def test_a_label_is_a_name_or_a_number():
    with pytest.raises(DataError, match=r"label is a float"):
        to_examples(_rows({"text": "t", "label": 0.5}))
