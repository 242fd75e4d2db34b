"""Columns of well-known data sets: hints by what they mean, and rows that mean something else refused by name."""

from __future__ import annotations

import pytest

from veneer.data.columns import Reading
from veneer.data.formats import to_examples
from veneer.data.messages import said_in
from veneer.data.read import Row
from veneer.errors import ConfigError, DataError
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit


def _read(reading=None, **fields):
    return to_examples([Row(fields, "d:1")], reading)


def test_columns_spelt_wrongly_are_hinted_at():
    with pytest.raises(DataError, match=r" Perhaps --columns prompt=promt\.$"):
        _read(promt="a", completion="b")
    with pytest.raises(DataError, match=r"text needs text\.$"):
        _read(id=1, embedding=[0.5])


def test_columns_are_read_as_they_are_said_to_be():
    rows = {"question": "a", "answer": "b", "answers": {"text": ["c", "d"]}, "title": "t", "prompt": "no"}
    read = _read(Reading({"prompt": "question", "completion": "answers.text.1"}), **rows)
    assert (read.shape, read.items[0].prompt, read.items[0].answer) == ("prompt/completion", "a", "d")
    assert read.unused == ["answer", "title", "prompt"]
    assert not read.read_as  # they were said
    read = _read(Reading({"text": "title+question"}, "text"), **rows)
    assert (read.shape, read.items[0].answer) == ("text", "t\na")
    assert _read(Reading(shape="text"), text="a", label="b").shape == "text"


@pytest.mark.parametrize(
    ("reading", "fields", "match"),
    [
        (Reading({"text": "titel"}), {"title": "a"}, r"^d:1 has no column 'titel' to read as text \(its columns: t"),
        (Reading({"prompt": "a", "output": "b"}), {"a": "a", "b": "b"}, r"^columns names prompt, output, which no"),
        (Reading(shape="messages"), {"text": "a"}, r"columns text, which fit not the shape messages\. messages needs"),
        (Reading({"text": "title+n"}), {"title": "a", "n": 1}, r"^d:1 has no title\+n \(its columns: title, n\)\.$"),
        (Reading(), {"problem": "a", "solution": "b", "answer": "c"}, r"columns solution and answer, each of which "
         r"could be the output; say which is: --columns instruction=…,output=solution\.$"),
    ],
)  # fmt: skip
def test_what_was_said_is_not_so(reading, fields, match):
    with pytest.raises(DataError, match=match):
        _read(reading, **fields)


def test_other_rows_are_read_as_those_of_the_run_where_they_have_its_columns():
    like = Reading({"instruction": "prompt", "output": "response"}, "instruction/output", asked=False)
    assert _read(like, prompt="a", response="b").shape == "instruction/output"
    assert _read(like, text="a").shape == "text"
    as_prompts = Reading({}, "prompt/completion", asked=False)
    assert _read(as_prompts, question="a", answer="b").shape == "prompt/completion"
    assert _read(Reading({}, "text", asked=False), text="a", label="b").shape == "text"


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"question": "prompt"}, r"^columns names 'question', which is none of .*\. Is prompt=question meant\?$"),
        ({"promt": "question"}, r"Did you mean 'prompt'\?$"),
    ],
)  # fmt: skip
def test_a_name_that_no_shape_has_is_refused(columns, match):
    with pytest.raises(ConfigError, match=match):
        TrainConfig(model="m", data="d", output="o", columns=columns)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
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
A_TURN = ["a", "b"]
# Well-known sets by their columns: what they are taken as (the shape, and what it holds), or what the refusal says.
SETS = {
    "alpaca": (
        {"instruction": "a", "input": "", "output": "b", "text": "### Instruction:\na\n\n### Response:\nb"},
        ("instruction/output", A_TURN),
    ),
    "alpaca-cleaned": ({"instruction": "a", "input": "", "output": "b"}, ("instruction/output", A_TURN)),
    "code_alpaca": ({"instruction": "a", "input": "i", "output": "b"}, ("instruction/output", ["a\n\ni", "b"])),
    "medical_qa": ({"instruction": "a", "input": "i", "output": "b"}, ("instruction/output", ["a\n\ni", "b"])),
    "dolly": (
        {"instruction": "a", "context": "i", "response": "b", "category": "c"},
        ("instruction/output", ["a\n\ni", "b"]),
    ),
    "OpenOrca": (
        {"id": "1", "system_prompt": "s", "question": "a", "response": "b"}, ("instruction/output", ["s", "a", "b"])
    ),
    "ShareGPT": ({"conversations": SHAREGPT}, ("messages", A_TURN)),
    "OpenHermes": (
        {"source": "s", "conversations": [{"from": "system", "value": "s"}, *SHAREGPT]}, ("messages", ["s", "a", "b"])
    ),
    "ultrachat": ({"prompt": "a", "prompt_id": "1", "messages": TALK}, ("messages", A_TURN)),
    "smoltalk": ({"messages": TALK, "source": "s"}, ("messages", A_TURN)),
    "tulu": ({"id": "1", "messages": TALK, "source": "s"}, ("messages", A_TURN)),
    "no_robots": ({"prompt": "a", "prompt_id": "1", "messages": TALK, "category": "c"}, ("messages", A_TURN)),
    "oasst1": ({"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"}, "is one message of a tree"),
    "gsm8k": ({"question": "a", "answer": "b"}, ("instruction/output", A_TURN)),
    "squad": (
        {"id": "1", "title": "t", "context": "c", "question": "a", "answers": {"text": ["b", "B"]}},
        ("instruction/output", ["a\n\nc", "b"]),
    ),
    "sst2": ({"idx": 0, "sentence": "a", "label": 1}, ("text/label", ["a\n", "1"])),
    "imdb": ({"text": "a", "label": "neg"}, ("text/label", ["a\n", "neg"])),
    "ag_news": ({"text": "a", "label": "World"}, ("text/label", ["a\n", "World"])),
    "banking77": ({"text": "a", "label": 11}, ("text/label", ["a\n", "11"])),
    "go_emotions": ({"text": "a", "labels": [1, 2], "id": "1"}, ("text/labels", ["a\n", "1, 2"])),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, ("text/label", ["a\nb\n", "1"])),
    "stsb": (
        {"sentence1": "a", "sentence2": "b", "label": 0.5, "idx": 0}, r"label is a float \(0.5\); a class is a name or"
    ),
    "samsum": ({"id": "1", "dialogue": "a", "summary": "b"}, ("instruction/output", A_TURN)),
    "cnn_dailymail": ({"article": "a", "highlights": "b", "id": "1"}, ("instruction/output", A_TURN)),
    "xsum": ({"document": "a", "summary": "b", "id": "1"}, ("instruction/output", A_TURN)),
    "wikitext": ({"text": "a"}, ("text", ["a"])),
    "c4": ({"text": "a", "timestamp": "t", "url": "u"}, ("text", ["a"])),
    "hh-rlhf": ({"chosen": HUMAN + "a", "rejected": HUMAN + "b"}, ("chosen/rejected", ["q", "a"])),
    "ultrafeedback": (
        {"prompt": "a", "chosen": TALK, "rejected": TALK, "score_chosen": 1.0}, ("chosen/rejected", A_TURN)
    ),
    "orca_dpo_pairs": (
        {"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, ("chosen/rejected", ["s", "a", "b"])
    ),
    "kto-mix": (
        {"prompt": TALK[:1], "completion": TALK[1:], "label": True}, ("prompt/completion/label", A_TURN)
    ),
    "glaive": ({"system": "s", "chat": "USER: a"}, "has a whole conversation as one text in the column chat"),
    "xlam": (
        {
            "query": "a",
            "tools": '[{"name": "f", "parameters": {}}]',
            "answers": '[{"name": "f", "arguments": {"x": 1}}]',
        },
        ("instruction/output", ["a", '[{"name": "f", "arguments": {"x": 1}}]']),
    ),
    "MetaMathQA": (
        {"query": "a", "response": "b", "type": "t", "original_question": "q"}, ("instruction/output", A_TURN)
    ),
    "opus_books": (
        {"id": "1", "translation": {"en": "a", "fr": "b"}}, "--columns instruction=translation.en,output=translation.fr"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_the_columns_of_well_known_sets_are_taken_or_refused_for_a_reason(name):
    fields, expected = SETS[name]
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            _read(**fields)
        return
    read = _read(**fields)
    (example,) = read.items
    texts = [text for text in (example.prompt, example.answer) if text]
    assert (read.shape, [said_in(message) for message in example.messages] or texts) == expected
    assert bool(read.read_as) == bool(read.columns)


def test_what_a_refusal_says_is_taken():
    translation = {"translation": {"en": "a", "fr": "b"}}
    read = _read(Reading({"instruction": "translation.en", "output": "translation.fr"}), **translation)
    assert [message["content"] for message in read.items[0].messages] == ["a", "b"]
    chosen = _read(Reading({"instruction": "question", "output": "chosen"}), question="a", chosen="b", rejected="c")
    assert chosen.items[0].last_answer() == "b"
    assert chosen.unused == ["rejected"]
    assert _read(Reading({"messages": "chosen"}), prompt="a", chosen=TALK, rejected=TALK).shape == "messages"
    pair = _read(Reading({"chosen": "good", "rejected": "bad"}), prompt="a", good="b", bad="c")
    assert (pair.items[0].answer, pair.items[0].rejected.answer) == ("b", "c")
    judged = _read(Reading(shape="prompt/completion"), prompt="a", completion="b", label=True)
    assert not judged.items[0].is_judged
    assert _read(Reading({"text": "chat"}), system="s", chat="USER: a").items[0].answer == "USER: a"


def test_calls_of_xlam_are_called_with_its_tools():
    (example,) = _read(**SETS["xlam"][0]).items
    assert example.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_a_refusal_of_a_wide_table_names_some_of_its_columns():
    with pytest.raises(DataError, match=r"c0, c1, .*c19 and 9,980 more, which fit no shape") as error:
        _read(**{f"c{number}": "x" for number in range(10_000)})
    assert len(str(error.value)) < 1000
