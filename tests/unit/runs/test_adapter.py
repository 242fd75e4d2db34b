"""An adapter's folder alone, its run deleted: the same prompts to the last byte, the same classes, the same answers."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

import veneer
from tokens import CHAT
from veneer.commands.generate import answer
from veneer.data import dates
from veneer.errors import AdapterFileError, ConfigError
from veneer.runs.facts import read_facts
from veneer.runs.folder import RunFolder
from veneer.runs.opened import open_named

pytestmark = pytest.mark.unit

DATED = "{{ strftime_now('%d %b %Y') }}|" + CHAT
QUESTION = ({"role": "user", "content": "q1"},)
QUIET = Console(file=io.StringIO())


def _talks(path: Path) -> Path:
    system = {"role": "system", "content": "Be brief."}
    rows = [[system, {"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}] for i in range(12)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def dated(tiny_folder, tmp_path_factory):
    """A run of July 2024 on conversations, over a base whose template prints the date."""
    place = tmp_path_factory.mktemp("dated")
    for part in veneer.load(tiny_folder):
        part.save_pretrained(place / "base")
    (place / "base" / "chat_template.jinja").write_text(DATED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veneer.runs.prepare.today", lambda: "2024-07-04")
        veneer.train(
            str(place / "base"), data=str(_talks(place / "rows.jsonl")), output=str(place / "run"), steps=4, rank=4,
            storage="nf4", held_out=4, learning_rate=1e-2, console=QUIET,
        )  # fmt: skip
    return place / "run"


@pytest.fixture
def alone(dated, tmp_path) -> Path:
    """The adapter's folder, somewhere else."""
    return shutil.copytree(dated / "adapter", tmp_path / "copied")


def _turn(opened):
    messages = ({"role": "system", "content": opened.renderer.system}, *QUESTION)
    return opened.renderer.tokenizer.decode(opened.renderer.turn(messages))


def test_a_prompt_is_rendered_as_in_the_run(dated, alone):
    run, adapter = open_named(dated), open_named(alone)
    assert _turn(run) == _turn(adapter) == "04 Jul 2024|<|system|>Be brief.<|end|>\n<|user|>q1<|end|>\n<|assistant|>"
    made = adapter.renderer
    assert (adapter.chat, made.system, made.max_length) == (True, "Be brief.", run.renderer.max_length)
    assert type(adapter.model.model.layers[0].self_attn.q_proj.base).__name__ == "QuantisedLinear", "as it was trained"
    ids = torch.tensor([run.renderer.turn(QUESTION)])
    with torch.no_grad():
        assert torch.equal(run.model(ids).logits, adapter.model(ids).logits)
    assert answer(dated, "q1", max_new_tokens=6) == answer(alone, "q1", max_new_tokens=6)


def test_the_template_of_the_run_wins_over_a_newer_one_of_the_base(alone, dated, monkeypatch, tmp_path):
    base = shutil.copytree(dated.parent / "base", tmp_path / "newer")
    (base / "chat_template.jinja").write_text(CHAT)
    config = alone / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(base)}))
    assert _turn(open_named(alone)).startswith("04 Jul 2024|")


def test_a_run_that_goes_on_on_another_day_renders_the_same_rows(dated, tmp_path):
    run = shutil.copytree(dated, tmp_path / "run")
    assert RunFolder(run).date() == "2024-07-04"
    assert veneer.resume(run, steps=6, console=QUIET).steps == 6
    facts = read_facts(run / "adapter")
    assert (facts.prompts.date, facts.rows.train, facts.rows.held_out) == ("2024-07-04", 8, 4)


def test_what_a_person_put_beside_the_adapter_stays_when_the_run_goes_on(dated, tmp_path):
    run = shutil.copytree(dated, tmp_path / "run")
    (run / "adapter" / "LICENSE").write_text("mine")
    veneer.resume(run, steps=5, console=QUIET)
    assert (run / "adapter" / "LICENSE").read_text() == "mine"


def test_load_takes_an_adapter_and_a_run(dated, alone):
    (model, tokenizer), (of_run, _) = veneer.load(alone), veneer.load(dated)
    assert dates.pinned_date(tokenizer) == "2024-07-04"
    ids = tokenizer("q1", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, of_run(ids).logits)
    said = veneer.generate(model, tokenizer, [{"role": "user", "content": "q1"}], max_new_tokens=2)
    assert isinstance(said, str)
    plain, _ = veneer.load(alone, storage="fp32")
    assert type(plain.model.layers[0].self_attn.q_proj.base).__name__ == "Linear"
    with pytest.raises(ConfigError, match=r"copied has its own task and classes; leave out task and labels\.$"):
        veneer.load(alone, labels=["a", "b"])


def test_a_classifier_alone_has_its_classes(finished_classifier, tmp_path, veneer_command):
    alone = shutil.copytree(finished_classifier / "adapter", tmp_path / "alone")
    run = veneer_command("generate", finished_classifier, "bet:", "--json")
    done = veneer_command("generate", alone, "bet:", "--json")
    assert done == run
    assert json.loads(done.out)["adapter"] == "yes"
    out = veneer_command("inspect", alone).out
    assert "\nclasses: no, yes\n" in out
    assert "BertForSequenceClassification" in out
    merged = veneer_command("merge", alone, tmp_path / "merged")
    assert merged.code == 0
    assert veneer_command("generate", tmp_path / "merged", "bet:").out.startswith("yes (")
    rows = finished_classifier.parent / "rows.jsonl"
    scores = [veneer_command("evaluate", f, "--data", rows, "--json").out for f in (alone, finished_classifier)]
    assert scores[0] == scores[1]
    assert not (alone / "evaluation.json").exists(), "which would quote rows"


def test_a_classifier_without_names_has_numbered_classes(finished_classifier, tmp_path, veneer_command):
    alone = shutil.copytree(finished_classifier / "adapter", tmp_path / "alone")
    (alone / "veneer.json").unlink()
    named = json.loads(veneer_command("generate", finished_classifier, "bet:", "--json").out)["probabilities"]
    numbered = json.loads(veneer_command("generate", alone, "bet:", "--json").out)["probabilities"]["adapter"]
    assert numbered == pytest.approx({"LABEL_1": named["adapter"]["yes"], "LABEL_0": named["adapter"]["no"]})
    assert "veneer.json" not in veneer_command("inspect", alone).out


def test_an_adapter_alone_is_evaluated_on_given_rows(alone, refused):
    assert refused("evaluate", alone) == (
        f"{alone} is an adapter alone, without the rows of its run; give rows with --data."
    )


def test_a_plain_lora_stands_alone_too(dated, alone, tmp_path, veneer_command):
    assert veneer_command("export", alone, tmp_path / "plain").code == 0
    assert _turn(open_named(tmp_path / "plain")) == _turn(open_named(dated))
    assert (tmp_path / "plain" / "README.md").is_file()


def test_a_base_that_is_not_here(alone, refused):
    config = alone / "adapter_config.json"
    fields = json.loads(config.read_text())
    known = "It was trained over base, LlamaForCausalLM, 32,224 parameters."
    todo = f"write where it is, a folder or a hub id, into that field. {known}"
    config.write_text(json.dumps({**fields, "base_model_name_or_path": "/nowhere/base"}))
    message = f"The base of {alone} is not at /nowhere/base (base_model_name_or_path in {config}); {todo}"
    assert refused("generate", alone, "x") == message
    config.write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    assert refused("generate", alone, "x") == f"{config} names no base model (base_model_name_or_path); {todo}"


def test_a_damaged_veneer_json(alone, refused):
    file = alone / "veneer.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "version": 4}))
    assert refused("generate", alone, "x") == f"{file} is of version 4, which a later Veneer wrote; update Veneer."
    file.write_text(json.dumps({**values, "steps": "many"}))
    assert refused("inspect", alone).startswith(f"{file} is damaged (steps: Input should be a valid integer")
    file.write_text("{")
    with pytest.raises(AdapterFileError, match=r"veneer\.json cannot be read as JSON: "):
        open_named(alone)


@pytest.fixture
def other_tokens(tiny_folder, tmp_path):
    """A run over a base that got two more tokens, which the adapter trains."""
    model, tokenizer = veneer.load(tiny_folder)
    tokenizer.add_tokens(["<|tool|>", "<|done|>"])
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = list(range(before, len(tokenizer)))
    veneer.attach(model, veneer.LoRA(rank=4, new_tokens=new, train_also=["lm_head"]))
    rows = [{"prompt": f"{a}<|tool|>", "completion": "yes<|done|>"} for a in "abcdefgh"]
    result = veneer.train(model, tokenizer, data=rows, output=str(tmp_path / "run"), steps=2, held_out=0, console=QUIET)
    return result


def test_a_changed_tokenizer_is_in_the_folder(other_tokens, tmp_path):
    alone = shutil.copytree(other_tokens.written, tmp_path / "alone")
    shutil.rmtree(other_tokens.folder)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in alone.iterdir()}
    card = (alone / "README.md").read_text()
    assert "AutoTokenizer.from_pretrained('ADAPTER')\nbase.resize_token_embeddings(263)\n" in card
    model, tokenizer = veneer.load(alone)
    ids = tokenizer("a<|tool|>", return_tensors="pt", add_special_tokens=False).input_ids
    assert ids.shape[1] == 2
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other_tokens.model(ids).logits)


def test_a_base_that_lost_its_tokens(other_tokens, tmp_path):
    alone = shutil.copytree(other_tokens.written, tmp_path / "alone")
    config = alone / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "trainable_token_indices": None}))
    with pytest.raises(AdapterFileError, match=r"was trained over a base of 263 tokens, and this one has 261: their"):
        veneer.load(alone)


def test_the_bases_own_tokenizer_is_not_copied(alone):
    assert sorted(path.name for path in alone.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "veneer.json",
    ]  # fmt: skip
