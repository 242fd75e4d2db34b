"""The chosen answer is the one that a plain computation, one row and one choice at a time, finds the likeliest."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import veneer
from tokens import tokenizer
from veneer.data.formats import Example
from veneer.data.labels import IGNORE, Renderer
from veneer.generation.labels import asked_of
from veneer.generation.likelihood import MOST_CHOICES, accuracy, choices_of, likeliest
from veneer.training.loss import Loss

pytestmark = pytest.mark.unit

PROMPTS = ["one", "a longer question, with a comma", "three?", "x", "Is this so", "12 + 30 =", "why"]


def _examples(answers=("a",)):
    return [Example(f"d:{i}", prompt=p, answer=answers[i % len(answers)]) for i, p in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def causal(tiny_folder):
    model, made = veneer.load(tiny_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # the answers of a fresh model are all alike
    return model, Renderer(made)


@pytest.fixture(scope="module")
def seq2seq():
    made = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.T5Config(
            vocab_size=len(made), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0,
            decoder_start_token_id=0, eos_token_id=made.eos_token_id,
        )  # fmt: skip
        model = tf.T5ForConditionalGeneration(config).eval()
    return model, Renderer(made, seq2seq=True)


@torch.no_grad()
def _plain(model, renderer, prompt, choice):
    """log p(choice | prompt), nothing padded and nothing batched."""
    before, answer = renderer.prompt(Example("d", prompt=prompt, answer="a")), renderer.encode(choice)
    if renderer.seq2seq:
        decoder = torch.tensor([[0, *answer[:-1]]])
        logits = model(input_ids=torch.tensor([before]), decoder_input_ids=decoder).logits[0]
    else:
        logits = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(answer)), answer].sum())


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("choices", [["a", "b", "c", "d"], [" yes", " no", " perhaps"]])
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_the_likeliest_choice(kind, choices, size, request):
    model, renderer = request.getfixturevalue(kind)
    plain = choices if kind == "causal" else [choice.strip() for choice in choices]
    wanted = [
        choices[max(range(len(choices)), key=lambda i: _plain(model, renderer, prompt, plain[i]))] for prompt in PROMPTS
    ]
    assert likeliest(model, renderer, _examples(), choices, size) == wanted
    if kind == "causal" and len(choices) == 4:
        assert len(set(wanted)) > 1, "or it could not be told from a constant"


def test_a_model_that_forms_all_logits_chooses_alike(causal, monkeypatch):
    model, renderer = causal
    choices, plain = ["a", "b", "c", "d"], model.forward
    wanted = likeliest(model, renderer, _examples(), choices, 4)

    def forward(input_ids, attention_mask, use_cache):
        return plain(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", forward)
    assert likeliest(model, renderer, _examples(), choices, 4) == wanted


@pytest.mark.parametrize("takes", ["logits_to_keep", "windows", "nothing"])
def test_logits_are_formed_where_they_are_needed_and_a_few_at_a_time(takes, tiny_folder, monkeypatch):
    """16 prompts of 1,004 tokens took 9.9 GB, 17 times the memory of the held-out loss: logits of every position."""
    model, made = veneer.load(tiny_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    examples = [Example(f"d:{i}", prompt="ab" * 40 + "c" * (i % 5), answer="a") for i in range(16)]
    labels, renderer, plain = ["yes", "no", "perhaps", "yet"], Renderer(made), model.forward
    wanted = likeliest(model, renderer, examples, labels, 16)
    formed = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: formed.append(output.shape[:2].numel()))
    if takes == "windows":  # a model that is asked for whole rows
        monkeypatch.setattr("veneer.generation.labels._is_plain", lambda model: False)
    if takes == "nothing":
        monkeypatch.setattr(
            model, "forward", lambda input_ids, attention_mask, use_cache: plain(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
            ),
        )  # fmt: skip
    assert likeliest(model, renderer, examples, labels, 16) == wanted
    if takes != "nothing":
        assert max(formed) <= 16 * 64, "of 16 · 80 positions, or 64 · 87"
    few = 100
    monkeypatch.setattr("veneer.generation.labels._FORMED", few * len(made))
    monkeypatch.setattr("veneer.generation.labels._KEPT", 1)
    formed.clear()
    assert likeliest(model, renderer, examples, labels, 16) == wanted
    assert max(formed) <= few


def test_a_long_prompt_keeps_its_end(causal):
    model, renderer = causal
    short = Renderer(renderer.tokenizer, max_length=4)
    cut = [Example("d", prompt=prompt[-3:], answer="a") for prompt in PROMPTS]
    choices = ["a", "b", "c", "d"]
    assert likeliest(model, short, _examples(), choices, 4) == likeliest(model, renderer, cut, choices, 4)


def test_a_classifiers_choice_does_not_depend_on_the_label(tiny_encoder):
    model, made = veneer.load(tiny_encoder, labels=["bad", "good"])
    with torch.no_grad():
        model.classifier.weight.mul_(100)
    renderer = Renderer(made, classes=("bad", "good"))
    with torch.no_grad():
        wanted = [
            ("bad", "good")[int(model(torch.tensor([made(prompt).input_ids])).logits.argmax())] for prompt in PROMPTS
        ]
    for answers in (("bad", "good"), ("good",), ("",)):
        assert likeliest(model, renderer, _examples(answers), ["bad", "good"], 3) == wanted


@pytest.mark.parametrize("right", [" no", " no way"])
def test_a_label_that_begins_another_is_chosen_by_its_end(right, tiny_folder):
    """Without the end token the shorter one would always be the likelier."""
    model, made = veneer.load(tiny_folder)
    renderer = Renderer(made)
    learned = renderer.one(Example("d", prompt="so?", answer=right))
    loss = Loss(model, renderer.pad, learned, kind="causal")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss([learned]).backward()
        optimizer.step()
    asked = [Example("d", prompt="so?", answer=right)]
    assert likeliest(model, renderer, asked, [" no", " no way"], 4) == [right]


def test_choices_have_the_tokens_that_are_trained():
    """In the chat template an answer has no space before it."""
    renderer, example = Renderer(tokenizer(), template="chat"), Example("d", prompt="so?", answer=" yes")
    row = renderer.one(example)
    trained = [label for label in row.labels if label != IGNORE]
    scored = [asked_of(renderer, [example], choices)[0] for choices in ([" yes", " no"], [" yes", " yes!"])]
    assert [each.answers[0] for each in scored] == [trained[:-1], trained]


def test_scores_that_are_no_numbers_are_a_sentence(tiny_folder, tiny_encoder):
    model, made = veneer.load(tiny_folder)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(veneer.VeneerError, match=r"^The model's logits are not finite"):
        likeliest(model, Renderer(made), _examples(), ["a", "bc"], 4)


def test_accuracy_is_the_share_of_right_answers():
    examples = _examples((" a", " b"))
    assert accuracy([" a"] * len(examples), examples) == pytest.approx(4 / 7)
    assert accuracy(["a", "b"] * 3 + ["a"], examples) == 1


def test_when_there_are_choices_to_choose_among():
    def rows(count, answers):
        return [Example("d", prompt="q", answer=f" {i % answers}") for i in range(count)]

    assert choices_of(rows(10, 2)) == [" 0", " 1"]
    spaced = [Example("d", prompt="q", answer=answer) for answer in (" 0", "0 ", " 1", "0", "1") * 2]
    assert choices_of(spaced) == [" 0", " 1"], "space around an answer makes no other answer"
    assert choices_of(rows(9, 2)) == [], "five rows for each, on average"
    assert choices_of(rows(100, 1)) == []
    assert len(choices_of(rows(500, MOST_CHOICES))) == MOST_CHOICES
    assert choices_of(rows(500, MOST_CHOICES + 1)) == []
    assert choices_of([*rows(50, 2), Example("d", answer="a plain text")]) == []
