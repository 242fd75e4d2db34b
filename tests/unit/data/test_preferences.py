"""Rows with preferences, in every form that people have them, become a question and its answers."""

from __future__ import annotations

import pytest

from tokens import tokenizer
from veneer.data.formats import to_examples
from veneer.data.labels import IGNORE, Renderer
from veneer.data.pairs import to_judged, to_pairs
from veneer.data.preferences import JUDGED, PAIRS
from veneer.data.read import Row
from veneer.errors import DataError

pytestmark = pytest.mark.unit

USER = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "S"}
MORE = [USER, {"role": "assistant", "content": "m"}, {"role": "user", "content": "and?"}]


def read(*rows):
    return to_examples([Row(fields, f"d:{number}") for number, fields in enumerate(rows, 1)])


def said(example):
    """What is asked, and the answer."""
    if not example.messages:
        return example.prompt, example.answer
    texts = [f"{message['role']}: {message['content']}" for message in example.messages]
    return texts[: example.given], texts[example.given :]


TURNS = (["user: q"], ["assistant: good"]), (["user: q"], ["assistant: bad"])
FORMS = {
    "texts": ({"prompt": "q:", "chosen": " good", "rejected": " bad"}, (("q:", " good"), ("q:", " bad"))),
    "texts that share a beginning": (
        {"chosen": "q: is it the good", "rejected": "q: is it the gone"},
        (("q: is it the", " good"), ("q: is it the", " gone")),
    ),
    "a text that goes on": ({"chosen": "q: a b", "rejected": "q: a b c"}, (("q: a", " b"), ("q: a", " b c"))),
    "conversations (ultrafeedback_binarized)": (
        {"prompt": "q", "prompt_id": "1", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        TURNS,
    ),
    "answers in messages": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, TURNS),
    "an answer as one message": ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, TURNS),
    "a prompt in messages, answers as text": ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, TURNS),
    "transcripts (hh-rlhf)": (
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        TURNS,
    ),
    "a system message (orca_dpo_pairs)": (
        {"system": "S", "prompt": "q", "chosen": "good", "rejected": "bad"},
        ((["system: S", "user: q"], ["assistant: good"]), (["system: S", "user: q"], ["assistant: bad"])),
    ),
    "no system message in this row": ({"system": "", "prompt": "q", "chosen": "good", "rejected": "bad"}, TURNS),
    "conversations that part late": (
        {"chosen": [*MORE, GOOD], "rejected": [*MORE, BAD]},
        (
            (["user: q", "assistant: m", "user: and?"], ["assistant: good"]),
            (["user: q", "assistant: m", "user: and?"], ["assistant: bad"]),
        ),
    ),
    "conversations that part early": (
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]},
        ((["user: q"], ["assistant: good", "user: q", "assistant: good"]), (["user: q"], ["assistant: bad"])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_is_asked_is_what_chosen_and_rejected_share(form):
    fields, expected = FORMS[form]
    examples = read(fields)
    (example,) = examples.items
    assert examples.shape == PAIRS
    assert example.is_judged
    assert (said(example), said(example.rejected)) == expected


def test_columns_beside_are_named():
    fields = {**FORMS["conversations (ultrafeedback_binarized)"][0], "score_chosen": 8.0}
    assert read(fields).notes() == ["Columns not used (chosen/rejected rows): prompt_id, messages, score_chosen."]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"chosen": "a", "rejected": "b"}, r"^d:1 has no prompt, and chosen and rejected share no beginning"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "chosen is text, rejected a list; they must"),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, "chosen is a int; an answer is text or a list of messages"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "^d:1 has no chosen"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "has no prompt, and chosen and rejected begin with different answers"),
        ({"chosen": [USER], "rejected": [USER]}, "part at message 1, which is the user's in chosen and the user's in"),
        ({"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt is none of the messages that"),
        ({"system": "S", "prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b"}, "and a system message as well"),
        ({"system": "S", "chosen": "a", "rejected": "b"}, r"columns: chosen, rejected, system"),
        (
            {"prompt": "what is it that you are", "chosen": "what is it that you are? a", "rejected": "what is it that "
             "you are? b"}, "begin with the prompt, which would come twice; leave out the column prompt",
        ),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_used_are_refused(fields, match):
    with pytest.raises(DataError, match=match):
        read(fields)


def test_a_true_or_false_label_judges_the_completion():
    first, second, talk = (
        {"prompt": "q:", "completion": " a", "label": True}, {"prompt": "q:", "completion": " b", "label": "False"},
        {"prompt": [USER], "completion": [BAD], "label": False},
    )  # fmt: skip
    examples = read(first, second, talk)
    assert examples.shape == JUDGED
    assert [example.desirable for example in examples.items] == [True, False, False]
    assert [said(example) for example in examples.items] == [("q:", " a"), ("q:", " b"), TURNS[1]]
    with pytest.raises(DataError, match=r"^d:2 has the label 3, where others have true or false"):
        read(first, {**second, "label": 3})


def test_another_label_beside_prompt_and_completion_is_a_column_not_used():
    examples = read({"prompt": "q", "completion": "a", "label": "easy"})
    assert (examples.shape, examples.unused) == ("prompt/completion", ["label"])


def renderer(**options):
    return Renderer(tokenizer(), **options)


def texts(row, learned):
    made = tokenizer()
    kept = [i for i, label in zip(row.ids, row.labels, strict=True) if (label != IGNORE) == learned]
    return made.decode(kept)


def test_a_pair_is_both_answers_after_the_same_prompt():
    fields, _ = FORMS["conversations that part early"]
    (pair,), report = to_pairs(renderer(), read(fields).items, first=7)
    assert pair.number == 7
    assert pair.ids == pair.first.ids + pair.second.ids
    assert texts(pair.first, learned=False) == "<|user|>q<|end|>\n<|assistant|>\n<|user|>q<|end|>\n<|assistant|>"
    assert texts(pair.first, learned=True) == "good<|end|>good<|end|>"
    assert (texts(pair.second, learned=False), texts(pair.second, learned=True)) == (
        "<|user|>q<|end|>\n<|assistant|>", "bad<|end|>",
    )  # fmt: skip
    assert report.learned == pair.first.learned + pair.second.learned


def test_pairs_with_nothing_to_compare_are_left_out_and_counted():
    rows = [
        {"prompt": "q:", "chosen": " good", "rejected": " bad"},
        {"prompt": "q:", "chosen": " same", "rejected": " same"},
        {"prompt": "q:", "chosen": " like one and all", "rejected": " like one and the same"},
        {"prompt": "a long question:", "chosen": " good", "rejected": " bad"},
    ]  # fmt: skip
    pairs, report = to_pairs(renderer(max_length=12), read(*rows).items)
    assert [(pair.where, pair.number) for pair in pairs] == [("d:1", 0)]
    assert report.sentences(12) == [
        "1 row (d:3) longer than max_length = 12 tokens: cut at the end.",
        "2 rows (d:2, d:3) left out, because chosen and rejected are the same within max_length = 12 tokens.",
        "1 row (d:4) left out, because no token to learn remains within max_length = 12.",
        "53.8 % of all tokens are in what was cut or left out.",
    ]
    with pytest.raises(
        DataError, match=r"^None of the 1 rows has answers to compare within max_length = 12; the first"
    ):
        to_pairs(renderer(max_length=12), read(rows[1]).items)


def test_a_judged_answer_stands_beside_that_of_another_question():
    asked = ("a:", "a:", "b:", "c:")
    rows = [{"prompt": one, "completion": f" {place}", "label": place % 2 == 0} for place, one in enumerate(asked)]
    pairs, _ = to_judged(renderer(), read(*rows).items)
    assert [pair.desirable for pair in pairs] == [True, False, True, False]
    assert [texts(pair.first, learned=True)[:2] for pair in pairs] == [" 0", " 1", " 2", " 3"]
    # The row before; but not one with the same question.
    assert [texts(pair.second, learned=True)[:2] for pair in pairs] == [" 3", " 3", " 1", " 2"]
    assert [texts(pair.second, learned=False) for pair in pairs] == list(asked)


@pytest.mark.parametrize("asked", ["aabbca", "aaa", "ab", "aaab", "baaa"])
def test_the_nearest_row_before_with_another_question(asked):
    rows = [{"prompt": f"{one}:", "completion": f" {place}", "label": True} for place, one in enumerate(asked)]
    pairs, _ = to_judged(renderer(), read(*rows).items)
    for place, pair in enumerate(pairs):
        before = [other % len(asked) for other in range(place - 1, place - len(asked), -1)]
        nearest = next((other for other in before if asked[other] != asked[place]), before[0])
        assert texts(pair.second, learned=True) == f" {nearest}<|end|>"


def test_a_pair_is_two_judged_answers():
    pairs, _ = to_judged(renderer(), read(FORMS["texts"][0]).items)
    assert [(texts(pair.first, learned=True), pair.desirable) for pair in pairs] == [
        (" good<|end|>", True), (" bad<|end|>", False),
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"^d:1 is the only row on its side; KTO measures it against the answers of"):
        to_judged(renderer(), read({"prompt": "q", "completion": "a", "label": True}).items)
