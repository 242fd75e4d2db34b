"""Messages as people have them, in the one form that templates take."""

from __future__ import annotations

import json

import pytest

from veneer.data.formats import to_examples
from veneer.data.messages import fold_turns, read_conversation, read_tools
from veneer.data.read import Row
from veneer.errors import DataError

pytestmark = pytest.mark.unit

ASKED = {"role": "user", "content": "Weather in Rome?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def _one(message):
    return read_conversation([ASKED, message], "messages", "d:1").messages[1]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, json.dumps({"city": "Rome"})])
def test_a_call_needs_no_content_and_its_arguments_become_an_object(content, arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    read = _one({"role": "assistant", **content, "tool_calls": [call]})
    assert read == {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]}


def test_the_old_form_of_a_call_becomes_todays():
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    read = _one({"role": "assistant", "content": None, "function_call": function})
    assert read == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert _one({"role": "function", "name": "weather", "content": "Sunny"})["role"] == "tool"


def test_parts_of_text_are_their_text():
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    assert _one({"role": "assistant", "content": parts})["content"] == "Good day"


def test_an_answer_may_say_that_it_is_not_learned():
    rows = [
        ASKED, {"role": "assistant", "content": "no", "weight": 0}, ASKED,
        {"role": "assistant", "content": "nor this", "train": False}, ASKED,
        {"role": "assistant", "content": "yes", "weight": 1.0},
    ]  # fmt: skip
    example = to_examples([Row({"messages": rows}, "d:1")]).items[0]
    assert example.answers() == [5]
    assert not any({"weight", "train"} & message.keys() for message in example.messages)
    with_system = to_examples([Row({"messages": rows, "system": "Be brief."}, "d:1")]).items[0]
    assert (with_system.answers(), with_system.messages[0]["content"]) == ([6], "Be brief.")


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "assistant", "content": "a", "weight": 0.5}, r"^d:1: message 2 of messages has weight = 0.5; an"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"has a part of the type 'image_url'; only parts"),
        ({"role": "user"}, r"^d:1: message 2 of messages is not an object with role and content \(text\).$"),
        ({"from": "gtp", "value": "a"}, r"is from 'gtp'; it may be human, user, .* Did you mean 'gpt'\?$"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"has a tool call without a function's name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]},
            r"calls f with arguments that are no JSON object: '\{x'",
        ),
    ],
)  # fmt: skip
def test_other_messages_are_refused(message, match):
    with pytest.raises(DataError, match=match):
        _one(message)


def test_tools():
    described = {"name": "weather", "parameters": {}}
    tool = {"type": "function", "function": described}
    for column, value in [
        ("tools", [tool]), ("tools", json.dumps([tool])), ("tools", [json.dumps(tool)]), ("functions", [described]),
    ]:  # fmt: skip
        assert read_tools(value, column, "d:1") == (tool,)
    assert read_tools(None, "tools", "d:1") == read_tools("", "tools", "d:1") == ()
    with pytest.raises(DataError, match=r"^d:1: tools is no list of tools"):
        read_tools("weather", "tools", "d:1")
    with pytest.raises(DataError, match=r"^d:1 has tools beside a prompt that is text; tools belong to conversations"):
        to_examples([Row({"prompt": "p", "completion": "c", "tools": [tool]}, "d:1")])


def test_a_conversation_that_ends_with_the_user_has_its_answer_before():
    talk = [ASKED, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "Thanks"}]
    example = to_examples([Row({"messages": talk}, "d:1")]).items[0]
    assert example.last_answer() == "Sunny."
    assert example.asked() == (ASKED,)


def test_turns_are_folded():
    def texts(*pairs, learned=()):
        messages = tuple({"role": role, "content": content} for role, content in pairs)
        folded, marks = fold_turns(messages, [number in learned for number in range(len(messages))])
        return [(m["role"], m["content"]) for m in folded], marks

    assert texts(("system", "S"), ("user", "a"), ("user", "b"), ("assistant", "c"), learned=[3]) == (
        [("user", "S\n\na\n\nb"), ("assistant", "c")], [False, True],
    )  # fmt: skip
    assert texts(("user", "a"), ("assistant", "b"), ("assistant", "c"), learned=[2])[1] == [False, False, True]
    assert texts(("tool", "a"), ("tool", "b"))[0] == [("tool", "a"), ("tool", "b")]


def test_sharegpt_is_read_as_it_is():
    call = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'}
    talk = [{"from": "human", "value": "Hi", "weight": 0}, call, {"from": "observation", "value": "Sunny."}]
    read = read_conversation([*talk, {"from": "gpt", "value": "It is."}], "conversations", "d:1")
    assert [(message["role"], message["content"]) for message in read.messages] == [
        ("user", "Hi"), ("assistant", ""), ("tool", "Sunny."), ("assistant", "It is."),
    ]  # fmt: skip
    assert read.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert read.unlearned == {0}
