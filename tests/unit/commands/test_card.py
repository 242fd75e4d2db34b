"""The model card: what it says, what it never says, and that a person's own words stay."""

from __future__ import annotations

import errno
import getpass
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

import veneer
from veneer.commands.card import card_text, write_card
from veneer.commands.push import _uploaded

pytestmark = pytest.mark.unit


def _front(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---")[1])


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def _refuse_private(text: str, *names: str) -> None:
    """No absolute path, no home, no user, no row."""
    for name in (str(Path.home()), "/tmp", *names):
        assert name not in text.replace("https://", "")
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)
    assert not re.findall(r"(?<![\w.])/(?:[\w.-]+/)+[\w.-]*", text), "no absolute path"


def test_what_a_card_says(run, tiny_folder):
    text = (run / "adapter" / "README.md").read_text()
    front = _front(text)
    assert (front["library_name"], front["pipeline_tag"], front["tags"]) == (
        "peft",
        "text-generation",
        ["veneer", "lora"],
    )
    assert {"base_model", "license"}.isdisjoint(front), "neither is known of a local model"
    assert front["model-index"][0]["results"][0]["metrics"][0]["type"] == "loss"
    assert "A LoRA adapter of rank 8 for a local model, tiny0 (LlamaForCausalLM, 32,224 parameters)" in text
    assert "- Rows: 32 of the shape prompt/completion; 16 more were held out." in text
    assert "- `learning_rate`: 0.01\n" in text
    for title in ("Veneer", "peft", "transformers, without peft", "vLLM", "llama.cpp"):
        assert f"\n### {title}\n" in text
    assert ModelCard.load(run / "adapter" / "README.md").data.library_name == "peft"
    _refuse_private(text, "bat:", str(tiny_folder))
    _refuse_private((run / "adapter" / "veneer.json").read_text(), "bat:", str(tiny_folder))


def test_scores_that_are_measured_come_into_the_card(run, veneer_command):
    assert veneer_command("evaluate", run).code == 0
    text = (run / "adapter" / "README.md").read_text()
    assert re.search(r"\| choice accuracy \| \d+\.\d % \| 100\.0 % \|", text)
    assert [m["type"] for m in _front(text)["model-index"][0]["results"][0]["metrics"]] == [
        "loss",
        "perplexity",
        "accuracy",
    ]
    _refuse_private(text, "bat:")


def test_an_edited_card_is_left_as_it_is(run, veneer_command):
    card = run / "adapter" / "README.md"
    mine = card.read_text() + "\nMy own words.\n"
    card.write_text(mine)
    done = veneer_command("evaluate", run, "--json")
    assert done.err == f"{card} has been edited, so it is left as it is; delete it to have a new one written.\n"
    json.loads(done.out)
    assert card.read_text() == mine
    out = veneer_command("train", "--resume", run, "--steps", 101).out
    assert "README.md has been edited, so it is left as it is" in " ".join(out.split())
    assert card.read_text() == mine
    card.unlink()
    assert write_card(run / "adapter") == ""
    assert card.is_file()


def test_a_merged_models_card(run, veneer_command, tmp_path):
    assert veneer_command("merge", run, tmp_path / "merged").code == 0
    text = (tmp_path / "merged" / "README.md").read_text()
    assert _front(text)["library_name"] == "transformers"
    assert "It is merged into the base's weights, in fp32." in text
    _refuse_private(text, "bat:")


def test_a_classifiers_card(finished_classifier):
    text = (finished_classifier / "adapter" / "README.md").read_text()
    assert _front(text)["pipeline_tag"] == "text-classification"
    assert "- Classes: no, yes.\n" in text
    assert "classes = ['no', 'yes']" in text
    assert "vLLM's adapters are for causal language models, and this is a classifier." in text
    _refuse_private(text, "bat:")


@pytest.mark.parametrize(
    ("base", "known", "license"),
    [
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", None),
    ],
)
def test_a_base_that_everybody_finds_is_named(base, known, license, run):
    adapter = run / "adapter"
    config, facts = adapter / "adapter_config.json", adapter / "veneer.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    values = json.loads(facts.read_text())
    facts.write_text(json.dumps({**values, "base": {**values["base"], "name": base, "license": license}}))
    assert write_card(adapter) == ""
    text = (adapter / "README.md").read_text()
    front = _front(text)
    assert (front["base_model"], front["base_model_relation"], front.get("license")) == (known, "adapter", license)
    assert f"# LoRA adapter for {base}\n" in text


def test_a_peft_folder_has_a_card_as_well(run):
    adapter = run / "adapter"
    (adapter / "veneer.json").unlink()
    assert write_card(adapter) == ""
    assert "# LoRA adapter for a local model\n" in (adapter / "README.md").read_text()


@pytest.mark.parametrize("method", ["full", "bias", "head"])
def test_a_run_of_the_models_own_weights_has_a_card_too(method, request, rows_file, tmp_path, veneer_command):
    """Of a language model, or, since the layers of a Llama have no biases, of a classifier."""
    base = request.getfixturevalue("tiny_encoder" if method == "bias" else "tiny_folder")
    run = tmp_path / "run"
    options = {"data": str(rows_file), "steps": 2, "batch_size": 8, "held_out": 16, "method": method}
    veneer.train(str(base), output=str(run), console=Console(quiet=True), **options)
    text = (run / "model" / "README.md").read_text()
    front = _front(text)
    task, kind = (
        ("text-classification", "SequenceClassification") if method == "bias" else ("text-generation", "CausalLM")
    )
    how = {"full": "Full fine-tuning", "bias": "Fine-tuning of the biases", "head": "Fine-tuning of the head"}[method]
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", task)
    assert front["tags"] == ["veneer", how.lower().replace(" ", "-")]
    assert f"{how} of a local model, {base.name} (" in text
    assert "- Rows: 32 of the shape prompt/completion; 16 more were held out.\n- Steps: 2.\n" in text
    assert f'model = AutoModelFor{kind}.from_pretrained("MODEL")' in text
    assert "veneer generate MODEL 'a prompt'" in text
    assert "adapter" not in text.lower()
    assert veneer_command("evaluate", run).code == 0
    text = (run / "model" / "README.md").read_text()
    assert "| on held-out rows | base | model |" in text
    assert "| choice accuracy | " in text
    for file in ("README.md", "veneer.json", "config.json"):
        _refuse_private((run / "model" / file).read_text(), "bat:", str(base))
    uploaded = _uploaded(run / "model", "somebody/mine")
    assert "`somebody/mine` is on the Hugging Face hub." in uploaded["README.md"].decode()
    assert 'from_pretrained("somebody/mine")' in card_text(run / "model", "somebody/mine")


def test_an_edited_card_beside_a_model_is_left_when_the_run_goes_on(tiny_folder, rows_file, tmp_path):
    run, quiet = tmp_path / "run", Console(quiet=True)
    options = {"data": str(rows_file), "steps": 2, "batch_size": 8, "held_out": 0, "method": "head"}
    veneer.train(str(tiny_folder), output=str(run), console=quiet, **options)
    card, license = run / "model" / "README.md", run / "model" / "LICENSE"
    card.write_text("My own words.")
    license.write_text("Mine.")
    said = io.StringIO()
    veneer.resume(run, steps=3, console=Console(file=said, width=500))
    assert (card.read_text(), license.read_text()) == ("My own words.", "Mine.")
    assert f"{card} has been edited, so it is left as it is" in said.getvalue()
    assert json.loads((run / "model" / "veneer.json").read_text())["steps"] == 3


def test_a_full_disk_costs_the_card_and_not_the_run(tiny_folder, rows_file, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run, said = tmp_path / "run", io.StringIO()
    options = {"data": str(rows_file), "steps": 2, "batch_size": 8, "held_out": 0, "rank": 2}
    with monkeypatch.context() as patched:
        patched.setattr("veneer.commands.card.write_text", full)
        result = veneer.train(str(tiny_folder), output=str(run), console=Console(file=said, width=500), **options)
    assert result.written == run / "adapter"
    assert (
        "The model card cannot be written: [Errno 28] No space left on device. To have it, resume the"
        in said.getvalue()
    )
    assert not (run / "adapter" / "README.md").exists()
    veneer.resume(run, console=Console(quiet=True))
    assert (run / "adapter" / "README.md").is_file()
