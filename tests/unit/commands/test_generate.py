"""veneer generate and chat: base, adapter or both; conversations where a run was trained on them."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import veneer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def conversing(tiny_folder, tmp_path_factory):
    """A run that learned by heart what a conversation's second answer is."""
    folder = tmp_path_factory.mktemp("conversing")
    rows = [
        [("hi", "yo"), ("more", "two")],
        [("so", "ok"), ("more", "no")],
    ]
    with (folder / "rows.jsonl").open("w") as file:
        for row in rows:
            talk = [m for q, a in row for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
            file.write(json.dumps({"messages": talk}) + "\n")
    veneer.train(
        str(tiny_folder), data=str(folder / "rows.jsonl"), output=str(folder / "run"), steps=120, batch_size=2,
        held_out=0, learning_rate=2e-2, train_also=["lm_head", "embed_tokens"],
    )  # fmt: skip
    return folder / "run"


def test_generate(finished_run, veneer_command):
    done = veneer_command("generate", finished_run, "bet:", "--max-new-tokens", 20)
    assert done == (0, " yes\n", "")
    base = veneer_command("generate", finished_run, "bet:", "--max-new-tokens", 6, "--base").out
    both = veneer_command("generate", finished_run, "bet:", "--max-new-tokens", 6, "--both").out
    assert both == f"base: {base}adapter:  yes\n"


def test_json_is_one_object_and_nothing_else(finished_run, veneer_command):
    done = veneer_command("generate", finished_run, "bet:", "--both", "--json", "--max-new-tokens", 6)
    assert done.err == ""
    found = json.loads(done.out)
    assert list(found) == ["prompt", "base", "adapter"]
    assert (found["prompt"], found["adapter"]) == ("bet:", " yes")
    assert found["base"] != found["adapter"]


def test_a_models_answer(tiny_folder, finished_run, veneer_command, refused):
    found = json.loads(veneer_command("generate", tiny_folder, "x", "--json", "--max-new-tokens", 4).out)
    assert list(found) == ["prompt", "model"]
    assert veneer_command("generate", tiny_folder, "x", "--max-new-tokens", 4).out == found["model"] + "\n"
    assert refused("generate", tiny_folder, "x", "--both") == (
        "--both needs a run or an adapter; this is a model without one."
    )
    assert refused("generate", finished_run, "x", "--both", "--base") == "Give --base or --both, not both of them."


def test_a_written_line_break_is_one(finished_run, veneer_command):
    written = veneer_command("generate", finished_run, r"a\nb", "--max-new-tokens", 8, "--json").out
    real = veneer_command("generate", finished_run, "a\nb", "--max-new-tokens", 8, "--json").out
    assert json.loads(written)["adapter"] == json.loads(real)["adapter"]


def test_sampling(finished_run, veneer_command):
    def sample(seed):
        return veneer_command("generate", finished_run, "b", "--base", "--temperature", 2, "--seed", seed,
                              "--max-new-tokens", 12).out  # fmt: skip

    assert sample(1) == sample(1) != sample(2)


def test_stop_texts(tiny_folder, veneer_command, refused):
    asked = ("generate", tiny_folder, "x", "--max-new-tokens", 30, "--json")
    whole = json.loads(veneer_command(*asked).out)["model"]
    place = len(whole) // 2
    stop = next(whole[i : i + 2] for i in range(place, len(whole)) if whole[i].isascii() and whole[i].isprintable())
    found = json.loads(veneer_command(*asked, "--stop", "a, never said", "--stop", stop).out)["model"]
    assert found == whole[: whole.index(stop)]
    assert found != whole
    said = veneer_command("chat", tiny_folder, "--max-new-tokens", 30, "--stop", stop, stdin="x\n").out
    assert stop not in said.removeprefix("you> model> ").removesuffix("\nyou> ")
    assert refused("generate", tiny_folder, "x", "--stop", "") == (
        "stop has an empty text, which would end every answer at once; leave it out."
    )


def test_a_written_line_break_stops_at_a_line_break(tiny_folder, veneer_command, monkeypatch):
    given = []
    monkeypatch.setattr("veneer.commands.generate.answers", lambda *_, **options: given.append(options) or {})
    veneer_command("generate", tiny_folder, "x", "--stop", r"\n", "--stop", "User:, a")
    veneer_command("generate", tiny_folder, "x")
    assert given == [{"stop": ["\n", "User:, a"]}, {}]


def test_cutting_off_needs_a_temperature(tiny_folder, refused, veneer_command):
    assert refused("generate", tiny_folder, "x", "--top-k", "5").startswith("top_k = 5 does nothing at temperature 0, ")
    how = ("--temperature", 3, "--top-k", 1, "--max-new-tokens", 6)
    greedy = veneer_command("generate", tiny_folder, "x", "--max-new-tokens", 6)
    assert veneer_command("generate", tiny_folder, "x", *how) == greedy


def test_the_template_is_the_one_the_run_was_trained_with(conversing, finished_run, veneer_command):
    assert veneer_command("generate", conversing, "hi").out == "yo\n"
    plain = veneer_command("generate", conversing, "hi", "--template", "plain", "--max-new-tokens", 8).out
    assert plain != "yo\n"
    other = veneer_command("generate", finished_run, "bet:", "--template", "chat", "--max-new-tokens", 8).out
    assert other != " yes\n"


def test_a_classifier_answers_with_a_class(finished_classifier, veneer_command):
    done = veneer_command("generate", finished_classifier, "bet:", "--both", "--json")
    found = json.loads(done.out)
    assert found["adapter"] == "yes"
    assert found["base"] in ("yes", "no")
    shares = found["probabilities"]["adapter"]
    assert list(shares) == ["yes", "no"], "the most likely first"
    assert sum(shares.values()) == pytest.approx(1)
    said = veneer_command("generate", finished_classifier, "bet:").out
    assert said == f"yes ({100 * shares['yes']:.1f} %)\n"
    assert said in veneer_command("chat", finished_classifier, stdin="bet:\n").out


@pytest.mark.parametrize("name", ["generate", "chat"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-new-tokens", "0"], "GenerateOptions: max_new_tokens = '0' is not valid: "),
        (["--temperature", "-1"], "GenerateOptions: temperature = '-1' is not valid: "),
        (["--temperature", "hot"], "GenerateOptions: temperature = 'hot' is not valid: "),
        (["--seed", "-1"], "GenerateOptions: seed = '-1' is not valid: "),
    ],
)
def test_values_that_make_no_sense(tiny_folder, refused, name, more, message):
    prompt = ["x"] if name == "generate" else []
    assert refused(name, tiny_folder, *prompt, *more).startswith(message)


def test_a_prompt_without_a_token(tiny_folder, finished_run, finished_classifier, refused, veneer_command):
    assert refused("generate", tiny_folder, "", "--template", "plain") == (
        "The question has an empty prompt, and the tokenizer puts nothing before it to go on from."
    )
    assert refused("generate", finished_run, "") == (
        "The question has an empty prompt, and the tokenizer puts nothing before it to go on from."
    )
    assert veneer_command("generate", tiny_folder, "", "--max-new-tokens", 2).code == 0, "a template is a prompt"


def test_a_prompt_longer_than_the_model_has_positions_for(tmp_path, veneer_command, refused):
    """Learned positions end somewhere: an index beyond them is no traceback, and no wrong answer."""
    import transformers as tf

    from tokens import tokenizer

    made = tokenizer()
    config = tf.GPT2Config(vocab_size=len(made), n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=None,
                           eos_token_id=None)  # fmt: skip
    for part in (tf.GPT2LMHeadModel(config), made):
        part.save_pretrained(tmp_path / "gpt2")
    message = refused("generate", tmp_path / "gpt2", "a" * 20, "--template", "plain")
    # What fits is answered as far as there are positions.
    assert len(veneer_command("generate", tmp_path / "gpt2", "a" * 12, "--template", "plain").out) <= 5
    assert message == "A prompt has 20 tokens, but the model positions for 16: nothing can follow."


def test_chat(conversing, veneer_command):
    done = veneer_command("chat", conversing, stdin="hi\nmore\n/new\nso\nmore\n\nnever read\n")
    assert done == (0, "you> adapter> yo\nyou> adapter> two\nyou> you> adapter> ok\nyou> adapter> no\nyou> ", "")


def test_chat_keeps_a_history_for_each_side(conversing, veneer_command):
    alone = veneer_command("chat", conversing, "--base", "--max-new-tokens", 5, stdin="hi\nmore\n").out
    both = veneer_command("chat", conversing, "--both", "--max-new-tokens", 5, stdin="hi\nmore\n").out

    def said(text, side):
        return [part.split("you> ")[0] for part in text.split(f"{side}> ")[1:]]

    assert [part.split("adapter> ")[0] for part in said(both, "base")] == said(alone, "base")
    assert [text.strip() for text in said(both, "adapter")] == ["yo", "two"]


def test_a_question_may_begin_with_a_slash(conversing, veneer_command):
    done = veneer_command("chat", conversing, stdin="/etc/hosts is what?\n")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("you> adapter> ")


def test_a_run_is_opened_after_its_rows_have_moved(conversing, veneer_command, tmp_path):
    run = shutil.copytree(conversing, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^data: .*$", "data: moved.jsonl", config))
    there, moved = (veneer_command("generate", folder, "hi") for folder in (conversing, run))
    assert (moved.code, moved.out) == (0, there.out)
    assert veneer_command("evaluate", run).err.startswith("Error: There is no file moved.jsonl.")


def test_a_merged_classifier_names_the_class(finished_classifier, veneer_command, tmp_path):
    assert veneer_command("merge", finished_classifier, tmp_path / "merged").code == 0
    run, merged = (veneer_command("generate", s, "bat:") for s in (finished_classifier, tmp_path / "merged"))
    assert (run.code, run.out) == (0, merged.out)
    assert re.fullmatch(r"(yes|no) \(\d+\.\d %\)\n", run.out)


def test_a_chat_with_a_model_that_has_no_template(tmp_path, tiny_folder, refused):
    model, made = veneer.load(tiny_folder)
    made.chat_template = None
    for part in (model, made):
        part.save_pretrained(tmp_path / "plain")
    assert refused("generate", tmp_path / "plain", "hi", "--template", "chat") == (
        f"The tokenizer of {tmp_path / 'plain'} has no chat template; use the template plain, or the model's instruct "
        "variant."
    )


def test_chat_in_a_terminal_tells_how_it_ends(tiny_folder, veneer_command):
    greeting = "An empty line or Ctrl-D ends the conversation, /new starts another one.\n"
    assert veneer_command("chat", tiny_folder, stdin="\n", terminal=True).out == f"{greeting}you> "
    assert veneer_command("chat", tiny_folder, stdin="").out.strip() == "you>", "the end of the input ends it, too"


def test_what_is_no_model(refused, tmp_path):
    missing = tmp_path / "none"
    assert refused("generate", missing, "x") == f"There is no model at {missing}."
    assert refused("chat", missing) == f"There is no model at {missing}."


def test_8_bit_activations(tiny_folder, finished_run, veneer_command, refused, tmp_path):
    assert veneer_command("quantize", tiny_folder, tmp_path / "nf4").code == 0
    asked = ("generate", tmp_path / "nf4", "x", "--max-new-tokens", 4)
    exact, rounded = veneer_command(*asked), veneer_command(*asked, "--activations", "int8")
    assert (exact.code, rounded.code, rounded.err) == (0, 0, "")
    assert refused("generate", finished_run, "x", "--activations", "int8") == (
        "Activations in 8 bits need a base kept in 4 bits (storage nf4, fp4 or int4); this is none."
    )
