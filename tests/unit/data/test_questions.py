"""Rows without answers are read as rows with them, and their answers play no part."""

from __future__ import annotations

import pytest

from tokens import tokenizer
from veneer.data.bad import BadRows
from veneer.data.columns import Reading
from veneer.data.formats import asked_text, to_examples
from veneer.data.labels import Renderer
from veneer.data.questions import to_questions, with_answer
from veneer.data.read import Row
from veneer.errors import DataError

pytestmark = pytest.mark.unit

USER, SAID = {"role": "user", "content": "so?"}, {"role": "assistant", "content": "yes"}
FULL = {
    "messages": {"messages": [USER, SAID, USER, SAID]},
    "prompt": {"prompt": "so?", "completion": " yes"},
    "prompt of messages": {"prompt": [USER], "completion": [SAID]},
    "instruction": {"instruction": "so?", "input": "x", "output": "yes"},
    "text": {"text": "so?", "label": "yes"},
}


def _rows(*fields):
    return [Row(each, f"rows.jsonl:{number}") for number, each in enumerate(fields, start=1)]


@pytest.mark.parametrize("shape", FULL)
def test_a_question_has_the_tokens_that_come_before_the_answer_in_training(shape):
    renderer, fields = Renderer(tokenizer()), FULL[shape]
    without = {name: value for name, value in fields.items() if name not in ("completion", "output", "label")}
    if shape == "messages":
        without = {"messages": fields["messages"][:-1]}
    (trained,) = to_examples(_rows(fields)).items
    for row in (fields, without):
        (question,) = to_questions(_rows(row), labelled=shape == "text").items
        assert renderer.prompt(question) == renderer.prompt(trained)
        answered = with_answer(question, " yes" if shape == "prompt" else "yes")
        assert renderer.one(answered).ids == renderer.one(trained).ids


def test_a_text_without_a_label_goes_on_where_it_belongs_to_none():
    assert to_questions(_rows({"text": "Once"})).items[0].prompt == "Once"
    assert to_questions(_rows({"text": "Once"}), labelled=True).items[0].prompt == "Once\n"


def test_what_is_there_of_answers_is_said():
    assert to_questions(_rows(FULL["prompt"])).answers == "the column completion"
    assert to_questions(_rows(FULL["messages"])).answers == "the assistant's last message"
    assert to_questions(_rows({"messages": [USER]}, {"messages": [USER]})).answers == ""
    assert to_questions(_rows({"prompt": "so?", "completion": None})).answers == ""


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"id": 3}], r"^rows\.jsonl:2 has no prompt \(its columns: id\)\.$"),
        ([{"prompt": "a"}, {"prompt": None}], r"^rows\.jsonl:2 has no prompt"),
        ([{"promt": "a"}], r"has the columns promt, and none of them is what is asked: messages, prompt, instruction "
                           r"or text\. Perhaps --columns prompt=promt\.$"),
        ([{"prompt": "a", "text": "b"}], r"of which prompt and text can each be what is asked\. Keep one"),
        ([{"prompt": "a"}, {"prompt": True}], r"^rows\.jsonl:2: prompt is true or false, not text"),
        ([{"text": 3}], r"^rows\.jsonl:1: text is a int, not text"),
        ([{"messages": []}], r"messages is not a list of messages"),
        ([{"messages": [SAID]}], r"messages holds an answer, and no message before it to answer"),
        ([{"messages": [{"role": "usr", "content": "a"}]}], r"has the role 'usr'.* Did you mean 'user'\?"),
    ],
)  # fmt: skip
def test_a_row_that_asks_nothing_is_refused(rows, message):
    with pytest.raises(DataError, match=message):
        to_questions(_rows(*rows))


@pytest.mark.parametrize(
    ("fields", "column", "asked"),
    [
        ({"id": 1, "question": "1 + 1 =", "context": "Sums."}, "question", "1 + 1 =\n\nSums."),
        ({"sentence1": "a", "sentence2": "b"}, "sentence1+sentence2", "a\nb"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "conversations", "a"),
    ],
)
def test_a_question_is_found_by_what_its_column_means(fields, column, asked):
    questions = to_questions(_rows(fields))
    assert (questions.column, asked_text(questions.items[0])) == (column, asked)
    assert f"{column} → " in questions.note


def test_a_question_is_read_as_the_run_s_rows_were():
    as_instruction = Reading({"instruction": "prompt", "output": "response"}, "instruction/output", asked=False)
    (question,) = to_questions(_rows({"prompt": "a"}), reading=as_instruction).items
    assert question.messages[0] == {"role": "user", "content": "a"}
    as_prompt = Reading({}, "prompt/completion", asked=False)
    assert to_questions(_rows({"question": "a"}), reading=as_prompt).items[0].prompt == "a"
    assert to_questions(_rows({"instruction": "a"}), reading=as_prompt).items[0].messages
    as_text = Reading({"text": "title+body"}, "text/label", asked=False)
    assert to_questions(_rows({"title": "a", "body": "b"}), reading=as_text).items[0].prompt == "a\nb\n"
    with pytest.raises(DataError, match=r"^rows.jsonl:1 has no column 'titel' to read as text .* mean 'title'\?"):
        to_questions(_rows({"title": "a"}), reading=Reading({"text": "titel"}))


def test_bad_questions_are_left_out_with_their_rows():
    bad = BadRows()
    questions = to_questions(_rows({"prompt": "a"}, {"id": 3}, {"prompt": "c"}), bad=bad)
    assert [row.where for row in questions.rows] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert [example.prompt for example in questions.items] == ["a", "c"]
    assert [(row.where, row.reason) for row in bad.rows] == [("rows.jsonl:2", "has no prompt (its columns: id).")]


def test_what_belongs_to_a_question_stays_with_it():
    tool = {"type": "function", "function": {"name": "weather"}}
    talk = [{"role": "user", "content": "Rome?"}]
    (question,) = to_questions([Row({"messages": talk, "tools": [tool], "system": "S"}, "d:1")]).items
    assert (question.tools, question.messages[0]["content"]) == ((tool,), "S")
    row = {"instruction": "c", "history": [["a", "b"]], "system": "S", "input": "x"}
    (question,) = to_questions([Row(row, "d:1")]).items
    assert [message["content"] for message in question.asked()] == ["S", "a", "b", "c\n\nx"]
