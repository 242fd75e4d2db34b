"""Continuations: those of the model's own generate, whatever stands beside them in a batch."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import tiny
import veneer
from tokens import tokenizer
from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.generation.generate import Told, answer_of, continuations, exact_matches
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
    assert continuations(model, renderer, [ids], max_new_tokens=6) == [made.decode(out[0], skip_special_tokens=True)]


def test_text_is_told_as_it_comes(parts):
    model, renderer = parts
    told = []
    (text,) = continuations(model, renderer, [renderer.encode("one")], max_new_tokens=12, on_text=told.append)
    assert "".join(told) == text
    assert len([piece for piece in told if piece]) > 1


def test_a_character_of_several_tokens_is_told_when_it_is_whole():
    made, said = tokenizer(), []
    told = Told(made, said.append)
    for token in made("aé€b").input_ids:
        told.put(torch.tensor([token]))
    assert said == ["a", "é", "€", "b"]
    told.put(torch.tensor([made("é").input_ids[0]]))
    assert said[4:] == []
    told.end()
    assert said[4:] == ["\ufffd"], "what remains half is told at the end"


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
