"""Conversations in templates of many families: what is learned, after which text, and what is said of it."""

from __future__ import annotations

import pytest

from families import FAMILIES
from tokens import tokenizer
from veneer.data.formats import Example, to_examples
from veneer.data.labels import IGNORE, Renderer
from veneer.data.read import Row
from veneer.errors import DataError

pytestmark = pytest.mark.unit

TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city"}}
CALL = {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


def _talk(*texts, **columns):
    """Alternating turns of user and assistant, or (role, text)."""
    turns = [text if isinstance(text, tuple) else (("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return to_examples([Row({"messages": messages, **columns}, "d:1")]).items[0]


def _rows(family, example, **options):
    """Each row with the learned part in ⟦⟧, and the sentences about them."""
    renderer = Renderer(tokenizer(chat=FAMILIES[family]), **options)
    kept, report = renderer.all([example])
    return [_marked(renderer, row) for row in kept], report.sentences(1024)


def _marked(renderer, row):
    text, inside = "", False
    for token, label in zip(row.ids, row.labels, strict=True):
        if (label != IGNORE) != inside:
            text += "⟧" if inside else "⟦"
            inside = not inside
        text += renderer.tokenizer.decode([token])
    return text + "⟧" * inside


def _asked(family, example):
    """Whether each row is the prompt that the model is asked with, and then what is learned."""
    renderer = Renderer(tokenizer(chat=FAMILIES[family]))
    for row in renderer.all([example])[0]:
        start = max(i for i, label in enumerate(row.labels) if label == IGNORE) + 1
        yield renderer.tokenizer.decode(row.ids[:start]), renderer.tokenizer.decode(row.ids[start:])


ONE, TWO = _talk("Hi", "Yo"), _talk("Hi", "Yo", "Go", "Ok")
SPLIT = (
    "1 row (d:1) became 2, one for each answer: the chat template changes earlier turns once others follow, so each "
    "answer comes after the text that the model will see."
)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_learned_after_the_text_that_the_model_is_asked_with(family):
    made = tokenizer(chat=FAMILIES[family])
    for example in (ONE, TWO, _talk("Hi", "Yo", "Go", "Ok", "Bye")):
        prompts = [
            made.apply_chat_template(list(example.messages[:n]), tokenize=False, add_generation_prompt=True)
            for n in example.answers()
        ]  # fmt: skip
        renderer = Renderer(made)
        rows, _ = renderer.all([example])
        learned = ["".join(made.decode([t for t in row.labels if t != IGNORE])) for row in rows]
        assert "".join(learned).count("<|end|>") == len(prompts), "an end token for each answer"
        assert all(text in "".join(learned) for text in ("Yo", "Ok")[: len(prompts)])
        assert "Bye" not in "".join(learned)
        assert made.decode(renderer.prompt(example)) == prompts[-1]


def test_thinking_is_taken_out_of_earlier_turns():
    example = _talk("Hi", "<think>\nA hello.\n</think>\n\nYo", "Go", "Ok")
    rows, said = _rows("thinking", example)
    assert rows == [
        "<|user|>Hi<|end|>\n<|assistant|>⟦<think>\nA hello.\n</think>\n\nYo<|end|>⟧",
        "<|user|>Hi<|end|>\n<|assistant|>Yo<|end|>\n<|user|>Go<|end|>\n<|assistant|>⟦<think>\n\n</think>\n\nOk<|end|>⟧",
    ]
    assert said == [SPLIT]
    assert _rows("thinking", example, learn="last") == (rows[1:], [])


def test_a_generation_prompt_that_opens_a_thought():
    rows, said = _rows("opens thinking", _talk("Hi", "<think>\nA hello.\n</think>\n\nYo", "Go", "Ok"))
    assert rows == [
        "<|user|>Hi<|end|><|assistant|><think>\n⟦A hello.\n</think>\n\nYo<|end|>⟧",
        "<|user|>Hi<|end|><|assistant|>Yo<|end|><|user|>Go<|end|><|assistant|><think>\n⟦\n</think>\n\nOk<|end|>⟧",
    ]
    assert said == [SPLIT]
    renderer = Renderer(tokenizer(chat=FAMILIES["opens thinking"]))
    assert renderer.ends() == [renderer.tokenizer.eos_token_id]
    assert renderer.answer(ONE) == "</think>\n\nYo"


def test_a_system_message_that_only_a_question_has():
    rows, _ = _rows("system last", _talk(("system", "S"), ("user", "Hi"), ("assistant", "Yo")))
    assert rows == ["<|user|>S\n\nHi[/INST]⟦ Yo<|end|>⟧"]


def test_the_ends_of_an_answer_are_found_or_the_end_token_alone():
    made = tokenizer(chat="{{ raise_exception('never') }}")
    assert Renderer(made).ends() == [made.eos_token_id]


@pytest.mark.parametrize("family", ["chatml", "thinking", "tools"])
def test_a_conversation_may_begin_with_the_assistant(family):
    rows, said = _rows(family, _talk(("assistant", "Hello"), ("user", "Hi"), ("assistant", "Yo")))
    assert len(rows) == 1
    assert "Hello" in rows[0].partition("⟦")[0]
    assert rows[0].partition("⟦")[2].endswith("Yo<|end|>⟧")
    assert said == ["1 row (d:1) with an answer before any question, which is given and not learned."]


def test_turns_are_folded_for_templates_that_take_none():
    example = _talk(("system", "S"), ("user", "Hi"), ("user", "there"), ("assistant", "Yo"))
    with pytest.raises(
        DataError, match=r"^d:1: the chat template refuses this conversation: System role .*\. With fold_turns"
    ):
        _rows("alternate", example)
    folded = "<|user|>S\n\nHi\n\nthere<|end|>\n<|assistant|>"
    assert _rows("alternate", example, fold_turns=True) == ([f"{folded}⟦Yo<|end|>⟧"], [])
    made = Renderer(tokenizer(chat=FAMILIES["alternate"]), fold_turns=True)
    assert made.tokenizer.decode(made.turn(example.messages[:3])) == folded


def test_a_call_is_learned_and_tools_reach_the_template():
    messages = [
        {"role": "user", "content": "Rome?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "Sunny"}, {"role": "assistant", "content": "It is sunny."},
    ]  # fmt: skip
    example = to_examples([Row({"messages": messages, "tools": [TOOL]}, "d:1")]).items[0]
    rows, said = _rows("tools", example)
    assert rows == [
        '<|system|>Tools: [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]<|end|>\n'
        '<|user|>Rome?<|end|>\n<|assistant|>⟦<call>{"name": "weather", "arguments": {"city": "Rome"}}</call><|end|>⟧\n'
        "<|tool|>Sunny<|end|>\n<|assistant|>⟦It is sunny.<|end|>⟧"
    ]
    assert said == []
    rows, said = _rows("raw calls", example)
    assert '⟦<call>weather {"city": "Rome"}</call><|end|>⟧' in rows[0]
    assert said == ["The chat template leaves out the tools of 1 row (d:1)."]
    assert _rows("chatml", example)[1] == [
        "The chat template leaves out the tool calls of 1 row (d:1).",
        "The chat template leaves out the tools of 1 row (d:1).",
    ]


def test_what_a_template_leaves_out_is_said():
    assert _rows("drops", _talk(("system", "S"), ("user", "Hi"), ("assistant", "Yo")))[1] == [
        "The chat template leaves out the system message of 1 row (d:1)."
    ]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    example = to_examples([Row({"messages": messages}, "d:1")]).items[0]
    assert _rows("chatml", example)[1] == ["Keys of messages that the chat template does not use: reasoning_content."]


def test_an_answer_of_no_weight_is_given():
    messages = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "WRONG", "weight": 0},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "RIGHT"},
    ]  # fmt: skip
    example = to_examples([Row({"messages": messages}, "d:1")]).items[0]
    (row,), said = _rows("chatml", example)
    assert row.partition("⟦")[2] == "RIGHT<|end|>⟧"
    assert said == []


def test_all_of_a_conversation_is_one_row_where_all_is_learned():
    (row,), said = _rows("thinking", TWO, learn="all")
    assert row == (
        "<|user|>⟦Hi<|end|>\n<|assistant|>Yo<|end|>\n<|user|>Go<|end|>\n<|assistant|><think>\n\n</think>\n\nOk<|end|>⟧"
    )
    assert said == []


def test_a_template_has_arguments():
    chat = "{% for m in messages %}{{ m.content }}{{ mark }}<|end|>{% endfor %}"
    renderer = Renderer(tokenizer(chat=chat), arguments={"mark": "!"})
    assert renderer.tokenizer.decode(renderer.one(ONE).ids) == "Hi!<|end|>Yo!<|end|>"


def test_an_encoder_decoder_learns_each_answer_and_never_the_question():
    renderer = Renderer(tokenizer(), seq2seq=True)
    decode = renderer.tokenizer.decode
    rows, _ = renderer.all([_talk("Hi", "Yo", "Go", "Ok", "Bye")])
    assert [(decode(row.ids), decode(row.labels)) for row in rows] == [
        ("Hi", "Yo<|end|>"), ("user: Hi\nassistant: Yo\nuser: Go", "Ok<|end|>"),
    ]  # fmt: skip
    assert len(Renderer(tokenizer(), seq2seq=True, learn="last").all([TWO])[0]) == 1


def test_markers_that_rows_bring_are_not_put_twice():
    renderer = Renderer(tokenizer(begin=True))
    decode = renderer.tokenizer.decode
    rows = [
        Example("d:1", prompt="<|begin|>Question", answer=" Answer<|end|>"),
        Example("d:2", answer="<|begin|><|user|>Hi<|end|>\n<|assistant|>Yo<|end|>\n"),
        Example("d:3", prompt="Question", answer=" Answer"),
    ]
    kept, report = renderer.all(rows)
    assert [decode(row.ids) for row in kept] == [
        "<|begin|>Question Answer<|end|>", "<|begin|><|user|>Hi<|end|>\n<|assistant|>Yo<|end|>\n",
        "<|begin|>Question Answer<|end|>",
    ]  # fmt: skip
    assert report.sentences(64) == [
        "2 rows (d:1, d:2) with special tokens in the text (<|begin|>, <|end|>, <|user|>, <|assistant|>), as if "
        "rendered already: begin and end tokens are added only where they are missing."
    ]
