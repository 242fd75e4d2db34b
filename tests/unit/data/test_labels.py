"""What is learned of a row: the answer and the end token, nothing else, and nothing lost in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from tokens import tokenizer
from veneer.data.formats import Example
from veneer.data.labels import IGNORE, Renderer
from veneer.errors import DataError

pytestmark = pytest.mark.unit

TALK = tuple(
    {"role": role, "content": content}
    for role, content in [("system", "S"), ("user", "hi"), ("assistant", "yo"), ("user", "go"), ("assistant", "ok")]
)
PROMPTED = Example("d:1", prompt="2+2=", answer=" 4")


def _learned(renderer, example):
    tokens = renderer.one(example)
    assert len(tokens.ids) == len(tokens.labels)
    assert all(label in (IGNORE, token) for token, label in zip(tokens.ids, tokens.labels, strict=True))
    decode = renderer.tokenizer.decode
    return decode(tokens.ids), decode([label for label in tokens.labels if label != IGNORE])


def test_only_the_answer_and_the_end_token_are_learned():
    assert _learned(Renderer(tokenizer()), PROMPTED) == ("2+2= 4<|end|>", " 4<|end|>")


def test_the_end_token_is_learned_where_pad_equals_it():
    made = tokenizer(pad="<|end|>")
    assert made.pad_token_id == made.eos_token_id
    assert Renderer(made).one(PROMPTED).labels[-1] == made.eos_token_id


def test_a_begin_token_is_put_where_the_tokenizer_puts_one():
    assert _learned(Renderer(tokenizer(begin=True)), PROMPTED) == ("<|begin|>2+2= 4<|end|>", " 4<|end|>")
    assert _learned(Renderer(tokenizer(begin=True)), Example("d", answer="ab")) == ("<|begin|>ab<|end|>", "ab<|end|>")
    assert _learned(Renderer(tokenizer()), Example("d", answer="ab")) == ("ab<|end|>", "b<|end|>")


def test_all_tokens_may_be_learned():
    assert _learned(Renderer(tokenizer(), learn="all"), PROMPTED) == ("2+2= 4<|end|>", "+2= 4<|end|>")


def test_every_answer_of_a_conversation_is_learned():
    whole, learned = _learned(Renderer(tokenizer()), Example("d", messages=TALK))
    assert whole == (
        "<|system|>S<|end|>\n<|user|>hi<|end|>\n<|assistant|>yo<|end|>\n<|user|>go<|end|>\n<|assistant|>ok<|end|>"
    )
    assert learned == "yo<|end|>ok<|end|>"
    assert _learned(Renderer(tokenizer()), Example("d", messages=TALK, given=3))[1] == "ok<|end|>"


def test_what_follows_the_last_answer_is_given_and_not_learned():
    whole, learned = _learned(Renderer(tokenizer()), Example("d", messages=TALK[:4]))
    assert whole.endswith("yo<|end|>\n<|user|>go<|end|>\n")
    assert learned == "yo<|end|>"


def test_a_conversation_is_what_the_template_renders():
    made = tokenizer()
    tokens = Renderer(made).one(Example("d", messages=TALK))
    assert made.decode(tokens.ids) == made.apply_chat_template(list(TALK), tokenize=False).rstrip("\n")


def test_the_prompt_of_an_example_is_what_stands_before_its_last_answer():
    renderer = Renderer(tokenizer())
    decode = renderer.tokenizer.decode
    assert decode(renderer.prompt(PROMPTED)) == "2+2="
    rendered = renderer.tokenizer.apply_chat_template(list(TALK[:4]), tokenize=False, add_generation_prompt=True)
    assert decode(renderer.prompt(Example("d", messages=TALK))) == rendered


def test_an_empty_prompt_is_one_only_where_a_token_stands_before_it():
    empty = Example("d:7", prompt="", answer=" a")
    with pytest.raises(DataError, match=r"^d:7 has an empty prompt, and the tokenizer puts nothing before it to go on"):
        Renderer(tokenizer()).prompt(empty)
    begin = tokenizer(begin=True)
    assert Renderer(begin).prompt(empty) == [begin.bos_token_id]


def test_a_turn_of_a_conversation_ends_where_the_model_is_to_answer():
    renderer = Renderer(tokenizer())
    assert renderer.tokenizer.decode(renderer.turn(TALK[1:2])) == "<|user|>hi<|end|>\n<|assistant|>"
    with pytest.raises(DataError, match=r"^The tokenizer of tiny has no chat template; use the template plain, or the"):
        Renderer(tokenizer(chat=None)).turn(TALK[1:2])


def test_what_ends_an_answer():
    made = tokenizer()
    assert Renderer(made).ends() == [made.eos_token_id]
    assert Renderer(tokenizer(chat=None)).ends() == [made.eos_token_id]
    other = tokenizer(chat="{% for m in messages %}{{ m['content'] }}<|system|>{% endfor %}")
    assert Renderer(other).ends() == [made.eos_token_id, made.convert_tokens_to_ids("<|system|>")]


def test_the_chat_template_for_prompted_text():
    whole, learned = _learned(Renderer(tokenizer(), template="chat"), PROMPTED)
    assert (whole, learned) == ("<|user|>2+2=<|end|>\n<|assistant|>4<|end|>", "4<|end|>")


def test_a_template_without_end_token_gets_one():
    made = tokenizer(chat="{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
                          "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    assert _learned(Renderer(made), Example("d", messages=TALK[1:3]))[1] == "yo<|end|>"


def test_a_template_that_rewrites_what_came_before_gives_a_row_for_each_answer():
    counts = "{{ messages | length }}{% for m in messages %}{{ m['content']FILTER }}{% endfor %}"
    made = tokenizer(chat=counts.replace("FILTER", ""))
    kept, report = Renderer(made).all([Example("d:7", messages=TALK)])
    assert [made.decode(row.ids) for row in kept] == ["2Shiyo<|end|>", "4Shiyogook<|end|>"]
    assert (report.split, report.parts) == (["d:7"], 2)
    made = tokenizer(chat=counts.replace("FILTER", " | upper"))
    with pytest.raises(DataError, match=r"^d:7: the chat template of tiny writes message 3 in a text in which"):
        Renderer(made).one(Example("d:7", messages=TALK))


def test_no_template_or_one_that_refuses():
    with pytest.raises(DataError, match=r"d:7 is a conversation, but the tokenizer of tiny has no chat template"):
        Renderer(tokenizer(chat=None)).one(Example("d:7", messages=TALK))
    with pytest.raises(DataError, match=r"d:7: the chat template refuses this conversation: no system"):
        Renderer(tokenizer(chat="{{ raise_exception('no system') }}")).one(Example("d:7", messages=TALK))


def test_rows_cut_or_left_out_are_counted():
    rows = [
        PROMPTED,
        Example("d:2", prompt="long " * 10, answer=" x"),
        Example("d:3", prompt="q", answer="an answer that is long"),
        Example("d:4", prompt="q", answer=""),
    ]
    kept, report = Renderer(tokenizer(), max_length=10).all(rows)
    assert [tokens.where for tokens in kept] == ["d:1", "d:3"]
    assert (report.rows, report.cut, report.left_out) == (4, ["d:3"], ["d:2", "d:4"])
    assert report.learned == sum(tokens.learned for tokens in kept)
    assert report.sentences(10) == [
        "1 row (d:3) longer than max_length = 10 tokens: cut at the end.",
        "1 row (d:4) left out, because there is no answer to learn in it.",
        "1 row (d:2) left out, because no token to learn remains within max_length = 10.",
        "80.0 % of all tokens are in what was cut or left out.",
    ]


def test_a_set_without_any_learned_token_is_an_error():
    with pytest.raises(
        DataError, match=r"None of the 1 rows has a token to learn within max_length = 4; the first is d:1"
    ):
        Renderer(tokenizer(), max_length=4).all([PROMPTED])


def test_classes():
    renderer = Renderer(tokenizer(), classes=("bad", "good"))
    tokens = renderer.one(Example("d:1", prompt="nice\n", answer=" good"))
    assert tokens.labels == [1]
    assert renderer.tokenizer.decode(tokens.ids) == "nice"
    with pytest.raises(
        DataError, match=r"d:2 has the label 'goood', which is not one of .*: bad, good. Did you mean 'good'"
    ):
        renderer.one(Example("d:2", prompt="x", answer="goood"))
    with pytest.raises(DataError, match=r"d:3 has no label"):
        renderer.one(Example("d:3", answer="x"))


def test_an_encoder_decoder_gets_source_and_target():
    renderer = Renderer(tokenizer(), seq2seq=True, max_length=6)
    tokens = renderer.one(PROMPTED)
    decode = renderer.tokenizer.decode
    assert (decode(tokens.ids), decode(tokens.labels)) == ("2+2=", "4<|end|>")
    assert decode(renderer.prompt(Example("d", messages=TALK[1:3]))) == "hi"
    (cut,), report = renderer.all([Example("d:1", prompt="a long text", answer="x")])
    assert (len(cut.ids), report.cut) == (6, ["d:1"])
    with pytest.raises(DataError, match="an encoder-decoder model learns from a prompt and an answer"):
        renderer.one(Example("d", answer="x"))


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_any_prompt_and_answer(prompt, answer):
    renderer = Renderer(tokenizer())
    tokens = renderer.one(Example("d", prompt=prompt, answer=answer))
    start = len(renderer.prompt(Example("d", prompt=prompt, answer=answer)))
    assert tokens.labels[:start] == [IGNORE] * start
    assert tokens.labels[start:] == tokens.ids[start:]
    assert tokens.ids[-1] == renderer.tokenizer.eos_token_id


def test_a_tokenizer_that_puts_a_space_before_every_text_puts_none_before_the_answer():
    """As Llama 2's does; the model, asked with the prompt's tokens, goes on without one."""
    made = tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Prepend("_")
    renderer = Renderer(made)
    assert _learned(renderer, Example("d", prompt="Is it so:", answer=" ok"))[1] == " ok<|end|>"
    whole = made.apply_chat_template(list(TALK), tokenize=False)
    assert renderer.one(Example("d", messages=TALK)).ids == renderer.encode(whole.removesuffix("\n"))
