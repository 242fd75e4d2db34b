"""veneer merge: a plain transformers model with its tokenizer, which answers as base and adapter did."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import tiny
from veneer.evaluation.opened import open_named

pytestmark = pytest.mark.unit

INPUTS = {"input_ids": torch.tensor([[72, 69, 76]])}


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_run_and_its_adapter(finished_run, veneer_command, tmp_path, inside):
    out = tmp_path / "deep" / "merged"
    done = veneer_command("merge", finished_run / inside, out)
    assert done == (0, f"Merged model written to {out}. Next: veneer chat {out}\n", "")
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(
        tiny.logits(model, INPUTS), tiny.logits(open_named(finished_run).model, INPUTS), rtol=0, atol=1e-5
    )
    assert tf.AutoTokenizer.from_pretrained(out)("bet:").input_ids == [65, 68, 83, 25]
    assert veneer_command("generate", out, "bet:", "--template", "plain").out == " yes\n"


@pytest.mark.parametrize(("storage", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_storage(finished_run, veneer_command, tmp_path, storage, dtype):
    assert veneer_command("merge", finished_run, tmp_path / "merged", "--storage", storage).code == 0
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_classifier(finished_classifier, veneer_command, tmp_path):
    assert veneer_command("merge", finished_classifier, tmp_path / "merged").code == 0
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        tiny.logits(model, INPUTS), tiny.logits(open_named(finished_classifier).model, INPUTS), rtol=0, atol=1e-5
    )
    assert model.config.id2label == {0: "no", 1: "yes"}


def test_nothing_is_overwritten(finished_run, tiny_folder, refused, veneer_command, tmp_path):
    file = tmp_path / "photos" / "cat.jpg"
    file.parent.mkdir()
    file.touch()
    for taken in (file, file.parent):
        assert refused("merge", finished_run, taken) == (
            f"{taken} exists and is not an empty folder; choose a new one."
        )
    for name in ("file", "child"):
        assert refused("merge", finished_run, file / name).startswith(f"Nothing can be written to {file}: ")
    assert refused("merge", finished_run, "/proc/merged").startswith("Nothing can be written to /proc: ")
    assert refused("merge", tiny_folder, tmp_path / "x") == (
        f"{tiny_folder} is a model, not a run or an adapter: there is nothing to merge."
    )
    assert not (tmp_path / "x").exists()
    (tmp_path / "empty").mkdir()
    assert veneer_command("merge", finished_run, tmp_path / "empty").code == 0
