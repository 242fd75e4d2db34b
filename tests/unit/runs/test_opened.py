"""A run, an adapter or a model by its name: the right model comes back, with its adapter on it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import tiny
import veneer
from veneer.errors import AdapterFileError, TrainingError
from veneer.runs.opened import open_named, open_run

pytestmark = pytest.mark.unit

INPUTS = {"input_ids": torch.tensor([[72, 69, 76]])}


def test_a_run_its_adapter_and_its_base(finished_run, tiny_folder):
    run, adapter, base = open_named(finished_run), open_named(finished_run / "adapter"), open_named(tiny_folder)
    assert torch.equal(tiny.logits(run.model, INPUTS), tiny.logits(adapter.model, INPUTS))
    assert not torch.equal(tiny.logits(run.model, INPUTS), tiny.logits(base.model, INPUTS))
    assert (run.adapted, adapter.adapted, base.adapted) == (True, True, False)
    assert (run.chat, adapter.chat, base.chat) == (False, False, True), "both go on as the run was trained"


@pytest.mark.parametrize("kind", ["template", "messages"])
def test_a_run_on_conversations_is_a_chat(kind, finished_run, tiny_folder, tmp_path, rows_file):
    more = {"template": "chat"} if kind == "template" else {}
    if kind == "messages":
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        rows_file.write_text(json.dumps({"messages": talk}) + "\n")
    result = veneer.train(
        str(tiny_folder), data=str(rows_file), output=str(tmp_path / "r"), held_out=0, steps=1, **more
    )
    assert open_named(result.folder).chat


def test_an_adapter_without_a_base_or_that_cannot_be_read(finished_run, tmp_path):
    adapter = shutil.copytree(finished_run / "adapter", tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json names no base model \(base_model_name_or_path\)"):
        open_named(adapter)
    config.write_text("{")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json cannot be read as JSON: "):
        open_named(adapter)


def test_a_run_that_is_not_finished(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    with pytest.raises(TrainingError, match=r"run has no adapter yet; finish the run: veneer train --resume .*run$"):
        open_run(run)
