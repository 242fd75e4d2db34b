"""veneer push: to a stand-in for the hub on this machine. What is uploaded is listed first, rows never are."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from rich.console import Console

import hub as stand_in
import veneer

pytestmark = pytest.mark.unit


@pytest.fixture
def hub(monkeypatch):
    with stand_in.serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by plain HTTP
        monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
        yield hub


@pytest.fixture
def adapter(finished_run, tmp_path) -> Path:
    return shutil.copytree(finished_run / "adapter", tmp_path / "adapter")


def test_a_runs_adapter_is_listed_and_uploaded(finished_run, hub, veneer_command, tiny_folder):
    done = veneer_command("push", finished_run, "alice/first", "--private")
    lines = done.out.splitlines()
    assert (done.code, lines[0]) == (0, f"To alice/first, from {finished_run / 'adapter'}:")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "veneer.json"]
    assert [line.split()[0] for line in lines[1:-1]] == names
    assert "without the base's path on this machine" in lines[2]
    assert lines[-1] == f"Uploaded to {hub.address}/alice/first"
    assert hub.private == {"alice/first"}
    files = hub.repos["alice/first"]
    assert sorted(files) == names
    weights = (finished_run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == weights
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert "PeftModel.from_pretrained(base, 'alice/first')" in files["README.md"].decode()
    for text in (files["README.md"], files["adapter_config.json"], files["veneer.json"]):
        assert str(tiny_folder).encode() not in text
        assert str(Path.home()).encode() + b"/" not in text


def test_from_python_to_an_organisation(adapter, hub):
    said = io.StringIO()
    assert veneer.push(adapter, "acme/it", console=Console(file=said)) == f"{hub.address}/acme/it"
    assert said.getvalue().startswith("To acme/it, from ")
    assert hub.private == set()
    veneer.push(adapter, "acme/it", update=True, console=Console(file=said))


def test_by_the_address_in_the_environment(adapter, hub):
    code = f"import veneer; print(veneer.push({str(adapter)!r}, 'alice/env'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"{hub.address}/alice/env"
    assert "adapter_model.safetensors" in hub.repos["alice/env"]


def test_a_card_that_was_edited_is_uploaded_as_it_is(adapter, hub):
    card = adapter / "README.md"
    card.write_text(card.read_text().replace("# LoRA adapter", "# My adapter"))
    veneer.push(adapter, "alice/mine", console=Console(file=io.StringIO()))
    assert hub.repos["alice/mine"]["README.md"] == card.read_bytes()


def test_a_merged_model(finished_classifier, hub, tmp_path, veneer_command):
    assert veneer_command("merge", finished_classifier, tmp_path / "merged").code == 0
    assert veneer_command("push", tmp_path / "merged", "alice/merged").code == 0
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.repos["alice/merged"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("data.jsonl", "which is or quotes rows"),
        ("evaluation.json", "which is or quotes rows"),
        ("optimizer.safetensors", "which is the state of a training"),
        ("training_args.bin", "a pickle, which can run code"),
        ("notes.txt", "which is no part of an adapter or a model"),
    ],
)
def test_a_folder_with_more_than_an_adapter(name, why, adapter, hub, refused):
    (adapter / name).touch()
    assert refused("push", adapter, "alice/it") == (
        f"{adapter} holds {name}, {why}: it is not uploaded; move it out of the folder."
    )
    assert hub.asked == []


def test_what_is_no_folder_to_push(adapter, finished_run, hub, refused, tmp_path):
    assert refused("push", tmp_path / "adaptr", "alice/it") == (
        f"There is no folder {tmp_path / 'adaptr'}. Did you mean '{adapter}'?"
    )
    (tmp_path / "empty").mkdir()
    assert refused("push", tmp_path / "empty", "alice/it") == (
        f"{tmp_path / 'empty'} is no run, adapter or model: it has no adapter_config.json and no config.json."
    )
    assert refused("push", adapter, "it") == "'it' is not the name of a repository on the hub; write OWNER/NAME."
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    assert refused("push", run, "alice/it").startswith(f"{run} has no adapter yet; finish the run")
    assert hub.asked == []


def _refusal(veneer_command, *arguments) -> str:
    """Of a push whose files are listed already."""
    done = veneer_command("push", *arguments)
    assert (done.code, "Traceback" in done.err) == (1, False)
    return done.err.removeprefix("Error: ").strip()


def test_without_a_token(adapter, hub, refused, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert refused("push", adapter, "alice/it") == (
        "HF_TOKEN is not set: make a token that may write at https://huggingface.co/settings/tokens, and set it in the "
        "environment."
    )


def test_with_a_token_that_the_hub_does_not_know(adapter, hub, veneer_command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert _refusal(veneer_command, adapter, "alice/it") == (
        "The hub does not accept the token in HF_TOKEN; make another one at https://huggingface.co/settings/tokens."
    )
    assert hub.repos == {}


def test_to_somebody_else(adapter, hub, veneer_command):
    assert _refusal(veneer_command, adapter, "alise/it") == (
        "The token in HF_TOKEN may not write to alise: it is for alice, acme. Did you mean 'alice'?"
    )
    assert hub.repos == {}


def test_to_a_repository_that_exists(adapter, hub, veneer_command):
    hub.repos["alice/it"] = {"old": b""}
    assert _refusal(veneer_command, adapter, "alice/it") == (
        "alice/it already exists on the hub; choose another name, or give --update to replace its files."
    )
    assert _refusal(veneer_command, adapter, "alice/it", "--update", "--private") == (
        "alice/it already exists on the hub, and --private is for a new one; change it in its settings."
    )
    assert hub.repos == {"alice/it": {"old": b""}}
    assert veneer_command("push", adapter, "alice/it", "--update").code == 0
    assert "veneer.json" in hub.repos["alice/it"]


def test_without_a_network(adapter, hub, veneer_command, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert _refusal(veneer_command, adapter, "alice/it").startswith(
        "Nothing was uploaded. The hub cannot be reached from here ("
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert _refusal(veneer_command, adapter, "alice/it") == (
        "Nothing was uploaded. HF_HUB_OFFLINE is set, so the hub was not asked."
    )


def test_an_upload_that_the_hub_refuses_on_the_way(adapter, hub, veneer_command):
    hub.down.add("/api/validate-yaml")
    message = _refusal(veneer_command, adapter, "alice/it")
    assert message.startswith("The hub refused the upload to alice/it: ")
    assert message.endswith("alice/it was made and may be empty: push again with --update.")
