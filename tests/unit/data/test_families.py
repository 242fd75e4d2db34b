"""Seventeen families of chat templates by eleven conversations: which text is learned, and after which."""

from __future__ import annotations

import pytest

from families import FAMILIES
from tokens import tokenizer
from veneer.data.formats import to_examples
from veneer.data.labels import IGNORE, Renderer
from veneer.data.read import Row
from veneer.errors import DataError

pytestmark = pytest.mark.unit

_USER, _ASSISTANT, _SYSTEM = ("user", "assistant", "system")
# Name → its turns, and the answers that are learned.
CONVERSATIONS = {
    "one": ([(_USER, "Hi"), (_ASSISTANT, "Yo")], ["Yo"]),
    "two": ([(_USER, "Hi"), (_ASSISTANT, "Yo"), (_USER, "Go"), (_ASSISTANT, "Ok")], ["Yo", "Ok"]),
    "system": ([(_SYSTEM, "Sys"), (_USER, "Hi"), (_ASSISTANT, "Yo")], ["Yo"]),
    "system, two": (
        [(_SYSTEM, "Sys"), (_USER, "Hi"), (_ASSISTANT, "Yo"), (_USER, "Go"), (_ASSISTANT, "Ok")], ["Yo", "Ok"]
    ),
    "ends with a question": ([(_USER, "Hi"), (_ASSISTANT, "Yo"), (_USER, "Go")], ["Yo"]),
    "begins with an answer": ([(_ASSISTANT, "Ah"), (_USER, "Hi"), (_ASSISTANT, "Yo")], ["Yo"]),
    "two questions at once": ([(_USER, "Hi"), (_USER, "Go"), (_ASSISTANT, "Yo")], ["Yo"]),
    "two answers at once": ([(_USER, "Hi"), (_ASSISTANT, "Yo"), (_ASSISTANT, "Ok")], ["Yo", "Ok"]),
    "weight 0": ([(_USER, "Hi"), (_ASSISTANT, "Yo", 0), (_USER, "Go"), (_ASSISTANT, "Ok")], ["Ok"]),
    "spaces": ([(_USER, " Hi "), (_ASSISTANT, " Yo ")], [" Yo "]),
    "three": (
        [(_USER, "Hi"), (_ASSISTANT, "Yo"), (_USER, "Go"), (_ASSISTANT, "Ok"), (_USER, "Up"), (_ASSISTANT, "No")],
        ["Yo", "Ok", "No"],
    ),
}  # fmt: skip
_ALTERNATE = ("alternate", "inside first", "bare")
_WITHOUT_SYSTEM = ("alternate", "bare")
_TRIMMED = ("alternate", "headers", "inside first")
# What a family writes around an answer, and the model has to say; the others the end token alone.
_AROUND = {
    "end after all": ("", "<turn>\n<|end|>"),
    "inside first": (" ", " <|end|>"),
    "system last": (" ", "<|end|>"),
}
_THINKING = ("thinking", "opens thinking")


def _refused(family, conversation):
    """Whether the template itself takes no such turns."""
    if conversation.startswith("system"):
        return family in _WITHOUT_SYSTEM
    return family in _ALTERNATE and conversation in (
        "begins with an answer", "two questions at once", "two answers at once"
    )  # fmt: skip


def _examples(turns):
    messages = [
        {"role": role, "content": text} | ({"weight": weight[0]} if weight else {}) for role, text, *weight in turns
    ]
    return to_examples([Row({"messages": messages}, "d:1")]).items


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_are_learned_and_nothing_else(family, conversation):
    turns, answers = CONVERSATIONS[conversation]
    made = tokenizer(chat=FAMILIES[family])
    renderer = Renderer(made)
    if _refused(family, conversation):
        with pytest.raises(DataError, match="the chat template refuses this conversation"):
            renderer.all(_examples(turns))
        return
    rows, _ = renderer.all(_examples(turns))
    learned = "".join(made.decode([token for token in row.labels if token != IGNORE]) for row in rows)
    answers = [text.strip() if family in _TRIMMED else text for text in answers]
    if family in _THINKING:  # which write a thought before it, and take the spaces away
        assert [text for text in ("Ah", "Yo", "Ok", "No", "Hi", "Go", "Up", "Sys") if text in learned] == [
            text for text in ("Yo", "Ok", "No") if any(text in answer for answer in answers)
        ]
        assert learned.count("<|end|>") == len(answers)
    else:
        before, after = _AROUND.get(family, ("", "<|end|>"))
        assert learned == "".join(f"{before}{text}{after}" for text in answers)


def test_there_are_as_many_as_are_promised():
    assert (len(FAMILIES), len(CONVERSATIONS)) == (17, 11)
