"""A run goes on with the tokenizer that it was given in memory, and with as many tokens, or says why it cannot."""

from __future__ import annotations

import json
import shutil

import pytest
from rich.console import Console

import veneer
from veneer.errors import ModelError
from veneer.models.own_tokenizer import tokenizer_in
from veneer.runs.folder import RunFolder
from veneer.runs.opened import open_run

pytestmark = pytest.mark.unit
QUIET = Console(quiet=True)
ROWS = [{"prompt": f"{a}{b}<|tool|>", "completion": "yes<|done|>"} for a in "abcd" for b in "abcd"]
OPTIONS = {"steps": 4, "batch_size": 4, "held_out": 0, "checkpoint_every": 2, "console": QUIET}


def _with_new_tokens(tiny_folder):
    model, tokenizer = veneer.load(tiny_folder)
    before = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens(["<|tool|>", "<|done|>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer, list(range(before, len(tokenizer)))


def _bytes(run):
    return (RunFolder(run).adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("steps", [0, 2])
def test_new_tokens_resume_to_the_same_bytes(tiny_folder, tmp_path, steps):
    model, tokenizer, new = _with_new_tokens(tiny_folder)
    veneer.attach(model, veneer.LoRA(rank=4, new_tokens=new, train_also=["lm_head"]))
    whole = veneer.train(model, tokenizer, data=ROWS, output=str(tmp_path / "whole"), keep_checkpoints=3, **OPTIONS)
    stopped = shutil.copytree(whole.folder, tmp_path / "stopped")
    shutil.rmtree(stopped / "adapter")
    for checkpoint in (stopped / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > steps:
            shutil.rmtree(checkpoint)
    resumed = veneer.resume(stopped, console=QUIET)
    assert _bytes(stopped) == _bytes(whole.folder)
    assert resumed.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert json.loads((stopped / "adapter" / "veneer.json").read_text())["own_tokenizer"]
    assert len(open_run(stopped).tokenizer) == len(tokenizer)


def test_another_template_is_resumed_with(tiny_folder, tmp_path):
    model, tokenizer = veneer.load(tiny_folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    asked = [[{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": "yes"}] for a in "abcdefgh"]
    rows = [{"messages": messages} for messages in asked]
    options = {**OPTIONS, "steps": 2, "rank": 2, "schedule": "constant"}
    result = veneer.train(model, tokenizer, data=rows, output=str(tmp_path / "run"), **options)
    resumed = veneer.resume(result.folder, steps=3, console=QUIET)
    assert resumed.tokenizer.chat_template == tokenizer.chat_template
    assert tokenizer_in(RunFolder(result.folder).tokenizer).get_vocab() == tokenizer.get_vocab()
    assert (result.written / "tokenizer.json").is_file(), "the result stands alone afterwards, too"


def test_the_bases_own_tokenizer_is_not_kept(tiny_folder, tmp_path):
    model, tokenizer = veneer.load(tiny_folder)
    rows = [{"prompt": a, "completion": "yes"} for a in "abcdefgh"]
    result = veneer.train(model, tokenizer, data=rows, output=str(tmp_path / "run"), rank=2, **OPTIONS)
    assert not RunFolder(result.folder).tokenizer.exists()


def test_a_run_whose_new_embeddings_are_nowhere_is_not_resumed(tiny_folder, tmp_path):
    model, tokenizer, _ = _with_new_tokens(tiny_folder)
    result = veneer.train(model, tokenizer, data=ROWS, output=str(tmp_path / "run"), rank=2, **OPTIONS)
    said = (
        rf"^{result.folder} began with a model of 263 tokens, which came in memory, and {tiny_folder} has 261: .* Save "
        r"that model and its tokenizer by save_pretrained, and start a new run over that folder\.$"
    )
    with pytest.raises(ModelError, match=said):
        veneer.resume(result.folder, steps=5, console=QUIET)


def test_the_base_of_a_full_run_with_new_tokens_is_nowhere(tiny_folder, tmp_path):
    model, tokenizer, _ = _with_new_tokens(tiny_folder)
    options = {**OPTIONS, "held_out": 4, "method": "full", "schedule": "constant"}
    result = veneer.train(model, tokenizer, data=ROWS, output=str(tmp_path / "run"), **options)
    assert veneer.resume(result.folder, steps=5, console=QUIET).steps == 5
    with pytest.raises(ModelError, match="began with a model of 263 tokens, which came in memory"):
        veneer.evaluate(result.folder)
