"""Continuations: those of the model's own generate, whatever stands beside them in a batch."""

from __future__ import annotations

import re

import pytest
import torch
import transformers as tf

import tiny
import veneer
from tokens import tokenizer
from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.generation.generate import answer_of, continuations, exact_matches
from veneer.generation.stream import Text, pieces
from veneer.training.batches import collate

pytestmark = pytest.mark.unit

PROMPTS = ["one", "a longer question, with a comma", "x"]


@pytest.fixture(scope="module")
def parts(tiny_folder):
    model, made = veneer.load(tiny_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model, Renderer(made)


def _ids(renderer):
    return [renderer.encode(prompt) for prompt in PROMPTS]


def test_greedy_is_the_models_own_generate_one_row_at_a_time(parts):
    model, renderer = parts
    wanted = []
    for ids in _ids(renderer):
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=renderer.pad)
        wanted.append(renderer.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    assert len(set(wanted)) == 3
    assert continuations(model, renderer, _ids(renderer), max_new_tokens=12) == wanted
    for ids, text in zip(_ids(renderer), wanted, strict=True):
        assert continuations(model, renderer, [ids], max_new_tokens=12) == [text], "padding plays no part"


def test_sampling_is_a_function_of_the_seed_and_leaves_the_random_state_alone(parts):
    model, renderer = parts

    def sample(seed):
        return continuations(model, renderer, _ids(renderer), max_new_tokens=12, temperature=1.5, seed=seed)

    before = torch.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(1) != continuations(model, renderer, _ids(renderer), max_new_tokens=12)


def test_the_same_prompt_and_seed_give_the_same_text_whatever_else_is_in_the_list(parts):
    model, renderer = parts
    ids = _ids(renderer)

    def sample(prompts):
        return continuations(model, renderer, prompts, max_new_tokens=12, temperature=1.5, seed=1)

    alone = [sample([prompt])[0] for prompt in ids]
    assert sample(ids) == alone
    assert sample([*ids[::-1], ids[0]]) == [*alone[::-1], alone[0]]


def test_an_encoder_decoder_begins_an_answer_of_its_own():
    made = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.T5Config(
            vocab_size=len(made), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0,
            decoder_start_token_id=0, eos_token_id=made.eos_token_id,
        )  # fmt: skip
        model = tf.T5ForConditionalGeneration(config).eval()
    renderer = Renderer(made, seq2seq=True)
    ids = renderer.prompt(Example("d", prompt="one", answer="a"))
    out = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    wanted = made.decode(out[0, 1:], skip_special_tokens=True)  # its start token is no part of what it says
    assert continuations(model, renderer, [ids, ids], max_new_tokens=6) == [wanted, wanted]
    assert "".join(pieces(model, renderer, ids, max_new_tokens=6)) == wanted
    sampled = [continuations(model, renderer, [ids] * n, max_new_tokens=6, temperature=2.0, seed=3) for n in (1, 2)]
    assert sampled[1] == sampled[0] * 2
    assert sampled[0] != [wanted]


def test_a_stream_is_the_text_piece_by_piece(parts):
    model, renderer = parts
    ids = renderer.encode("one")
    streamed = list(pieces(model, renderer, ids, max_new_tokens=12))
    assert ["".join(streamed)] == continuations(model, renderer, [ids], max_new_tokens=12)
    assert len(streamed) > 1


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    made = tokenizer()
    text = Text(made)
    assert [piece for token in made("aé€b").input_ids if (piece := text.put(token))] == ["a", "é", "€", "b"]
    assert text.put(made("é").input_ids[0]) == ""
    assert text.end() == "\ufffd", "what remains half comes at the end"


def test_a_text_is_one_answer_and_a_list_a_list(parts):
    model, renderer = parts
    wanted = continuations(model, renderer, _ids(renderer), max_new_tokens=5)
    made = renderer.tokenizer
    assert veneer.generate(model, made, PROMPTS, max_new_tokens=5) == wanted
    assert veneer.generate(model, made, PROMPTS[0], max_new_tokens=5) == wanted[0]
    assert "".join(veneer.stream(model, made, PROMPTS[0], max_new_tokens=5)) == wanted[0]
    assert veneer.generate(model, made, []) == []


def test_a_conversation_goes_into_the_chat_template(parts):
    model, renderer = parts
    talks = [[{"role": "user", "content": text}] for text in ("hi", "and now?")]
    ids = [renderer.encode(f"<|user|>{text}<|end|>\n<|assistant|>") for text in ("hi", "and now?")]
    wanted = continuations(model, renderer, ids, max_new_tokens=5)
    made = renderer.tokenizer
    assert veneer.generate(model, made, talks, max_new_tokens=5) == wanted
    assert veneer.generate(model, made, talks[0], max_new_tokens=5) == wanted[0]
    assert veneer.generate(model, made, [talks[0], "one"], max_new_tokens=5)[0] == wanted[0]
    assert "".join(veneer.stream(model, made, talks[1], max_new_tokens=5)) == wanted[1]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "A prompt is empty: there is nothing to go on from."),
        (["one", ""], "A prompt is empty: there is nothing to go on from."),
        ([[]], "A prompt is empty: there is nothing to go on from."),
        (3, "A prompt is a str, a list of messages, or a list of these, not the int 3."),
        ({"role": "user"}, "A prompt is a str, a list of messages, or a list of these, not the dict {'role': 'user'}."),
        (["one", 3], "A prompt is a str or a list of messages, not the int 3."),
        ([{"role": "user"}], "A message has a role and a content, both str; this is the dict {'role': 'user'}."),
        ([{"role": "user", "content": 1}], "A message has a role and a content, both str; this is the dict "
                                           "{'content': 1, 'role': 'user'}."),
        ([["one"]], "A message has a role and a content, both str; this is the str 'one'."),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_a_sentence(parts, prompts, message):
    model, renderer = parts
    with pytest.raises(veneer.VeneerError, match=f"^{re.escape(message)}$"):
        veneer.generate(model, renderer.tokenizer, prompts)


def test_other_wrong_arguments_are_sentences(parts, tiny_encoder):
    model, made = parts[0], parts[1].tokenizer
    for arguments, options, message in (
        (
            ("folder", made, "x"),
            {},
            " takes a loaded model (a torch.nn.Module) as model, not the str 'folder'.",
        ),
        ((model, "folder", "x"), {}, " takes the model's tokenizer as tokenizer, not the str 'folder'."),
        ((model, made, "x"), {"max_new_tokens": 0}, "SamplingOptions: max_new_tokens = 0 is not valid: "),
        ((model, made, "x"), {"temperature": "hot"}, "SamplingOptions: temperature = 'hot' is not valid: "),
        ((tf.BertModel.from_pretrained(tiny_encoder), made, "x"), {}, "A BertModel has no head that generates text"),
    ):
        for function in (veneer.generate, veneer.stream):
            said = function.__name__ + message if message.startswith(" ") else message
            with pytest.raises(veneer.VeneerError, match=f"^{re.escape(said)}"):
                function(*arguments, **options)
    with pytest.raises(
        veneer.VeneerError,
        match=r"^stream answers one prompt, .*; generate answers several\.$",
    ):
        veneer.stream(model, made, ["one", "two"])
    plain = tokenizer(chat=None)
    with pytest.raises(veneer.VeneerError, match="has no chat template"):
        veneer.generate(model, plain, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "SamplingOptions: max_new_tokens = -1 is not valid: Input should be greater than"),
        ({"temperature": float("nan")}, "SamplingOptions: temperature = nan is not valid: Input should be a finite"),
        ({"temperature": float("inf")}, "SamplingOptions: temperature = inf is not valid: Input should be a finite"),
        ({"temperature": -0.1}, "SamplingOptions: temperature = -0.1 is not valid: Input should be greater"),
        ({"seed": 2**64}, "SamplingOptions: seed = 18446744073709551616 is not valid: Input should be less than"),
        ({"top_p": 0.0, "temperature": 1}, "SamplingOptions: top_p = 0.0 is not valid: Input should be"),
        ({"top_k": -1}, "SamplingOptions: top_k = -1 is not valid: "),
        ({"min_p": 1.5}, "SamplingOptions: min_p = 1.5 is not valid: "),
        ({"repetition_penalty": 0}, "SamplingOptions: repetition_penalty = 0 is not valid: "),
        ({"top_p": 0.9}, "top_p = 0.9 does nothing at temperature 0, which takes the likeliest token; give a "
                         "temperature above 0, such as 0.7, or leave top_p out."),
        ({"stop": ["a", ""]}, "stop has an empty text, which would end every answer at once; leave it out."),
        ({"stop": 3}, "SamplingOptions: stop = 3 is not valid: Input should be a valid string, or a valid list."),
        ({"stop_strings": "a"}, "SamplingOptions has other names for these: stop_strings is stop."),
        ({"do_sample": True}, "SamplingOptions has other names for these: do_sample follows from temperature: above 0"),
        ({"top_q": 1}, "SamplingOptions has no option 'top_q'. Did you mean 'top_p'"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_sentences(parts, options, message):
    model, renderer = parts
    for function in (veneer.generate, veneer.stream):
        with pytest.raises(veneer.VeneerError, match=f"^{re.escape(message)}"):
            function(model, renderer.tokenizer, "a", **options)


def test_half_of_a_surrogate_pair_is_a_sentence(parts):
    model, renderer = parts
    message = re.escape(
        r"A text has '\ud83d' as its character 3, half of a surrogate pair, which is no character: the text was cut or "
        r"decoded wrongly. It begins 'ab\ud83d'."
    )
    with pytest.raises(veneer.VeneerError, match=f"^{message}$"):
        veneer.generate(model, renderer.tokenizer, "ab\ud83d")
    with pytest.raises(veneer.VeneerError, match="half of a surrogate pair"):
        veneer.generate(model, renderer.tokenizer, [{"role": "user", "content": "ab\ud83d"}])
    for seq2seq in (False, True):
        with pytest.raises(veneer.VeneerError, match="half of a surrogate pair"):
            Renderer(renderer.tokenizer, seq2seq=seq2seq).prompt(Example("d", prompt="\udc00", answer="a"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_token_without_an_embedding_is_a_sentence(name):
    made = tokenizer()
    message = r"^A prompt holds token \d+, but the model's embedding has 64 rows: .*resize_token_embeddings"
    with pytest.raises(veneer.VeneerError, match=message):
        veneer.generate(tiny.build(name), made, "a\xff")


def test_a_token_without_an_embedding_is_a_sentence_to_every_command(tmp_path, refused):
    made, folder = tokenizer(), tmp_path / "small"
    for part in (tiny.build("llama"), made):
        part.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a\xff"}\n', encoding="utf-8")
    for more in (("generate", folder, "a\xff"), ("predict", folder, tmp_path / "rows.jsonl"),
                 ("predict", folder, tmp_path / "rows.jsonl", "--labels", "a,b")):  # fmt: skip
        assert "but the model's embedding has 64 rows" in refused(*more)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_pad_token_without_an_embedding_pads_all_the_same(name):
    model, renderer = tiny.build(name), Renderer(tokenizer(), seq2seq=name == "t5")
    assert renderer.pad >= tiny.VOCABULARY
    prompts = [[5, 6, 7, 8], [7], [9, 10]]
    alone = [continuations(model, renderer, [prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert continuations(model, renderer, prompts, max_new_tokens=4) == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_logits_that_are_no_numbers_are_a_sentence(name, temperature):
    model = tiny.build(name)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    renderer = Renderer(tokenizer(), seq2seq=name == "t5")
    with pytest.raises(veneer.VeneerError, match=r"^The model's logits are not finite, so there is no answer: "):
        continuations(model, renderer, [[5, 6], [7]], max_new_tokens=3, temperature=temperature)


def test_exact_matches(tiny_folder):
    """A model that learned three answers by heart."""
    model, made = veneer.load(tiny_folder)
    renderer = Renderer(made)
    known = [Example("d", prompt=p, answer=a) for p, a in [("b:", " yes"), ("a longer one:", " no"), ("c:", " dog")]]
    talk = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})
    known.append(Example("d", messages=talk))
    veneer.attach(model, veneer.LoRA(rank=8, train_also=["lm_head"]))
    batch = collate([renderer.one(example) for example in known], renderer.pad)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels}
    assert tiny.train_steps(model, inputs, steps=80, lr=1e-2) < 0.05
    assert exact_matches(model, renderer, known, batch_size=2) == [True] * 4
    others = [
        Example("d", prompt="b:", answer=" yes, sir"),
        Example("d", prompt="a longer one:", answer=" n"),  # goes on after what would have been the answer
        Example("d", prompt="c:", answer="dog "),  # but for the space around it
    ]
    assert exact_matches(model, renderer, others, batch_size=3) == [False, False, True]


def test_what_the_right_answer_is():
    talk = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": " yo "})
    assert answer_of(Example("d", messages=talk)) == "yo"
    assert answer_of(Example("d", prompt="q", answer=" a\n")) == "a"
