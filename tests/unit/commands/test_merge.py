"""veneer merge: a plain transformers model with its tokenizer, which answers as base and adapter did."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers as tf

import tiny
from veneer.data.formats import Example
from veneer.frozen.layers import storage_of
from veneer.models.load import load
from veneer.runs.opened import open_named, open_run

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


@pytest.mark.parametrize("given", [True, False])
def test_into_4_bits_tells_how_far_the_predictions_moved(finished_run, veneer_command, tmp_path, given):
    check = ["--check", finished_run.parent / "rows.jsonl"] if given else []
    out = tmp_path / "merged"
    done = veneer_command("merge", finished_run, out, "--storage", "nf4", "--block-size", "32", *check)
    assert (done.code, done.err) == (0, "")
    moved, written = done.out.splitlines()
    assert written == f"Merged model written to {out}. Next: veneer chat {out}"
    told = re.fullmatch(
        r"On (\d+) rows \((\d+) predictions\) nf4 moves the merged model by a mean KL of (.+) nats; the most likely "
        r"prediction stays the same in (.+) %\.",
        moved,
    )
    assert told
    rows, predictions, kl, same = map(float, told.groups())
    assert rows == (48 if given else 16)
    model, _ = load(out)
    assert storage_of(model) == {"storage": "nf4", "block_size": 32, "double_quantisation": True}
    # The same by hand, a row after another.
    plain = open_named(finished_run)
    kls, agreed = [], []
    lines = (finished_run.parent / "rows.jsonl").read_text().splitlines()
    examples = [Example(where="", **{"prompt": r["prompt"], "answer": r["completion"]}) for r in map(json.loads, lines)]
    if not given:
        examples = open_run(finished_run).held_out
    for row in plain.renderer.all(examples)[0]:
        learned = torch.tensor(row.labels[1:]) != -100
        inputs = {"input_ids": torch.tensor([row.ids])}
        p, q = (tiny.logits(m, inputs)[0, :-1][learned].log_softmax(-1) for m in (plain.model, model))
        kls += (p.exp() * (p - q)).sum(-1).tolist()
        agreed += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert predictions == len(kls)
    assert kl == pytest.approx(sum(kls) / len(kls), abs=1e-4)
    assert same == pytest.approx(100 * sum(agreed) / len(agreed), abs=0.06)


def test_a_classifier_into_4_bits(finished_classifier, veneer_command, tmp_path):
    done = veneer_command("merge", finished_classifier, tmp_path / "merged", "--storage", "fp4")
    assert done.code == 0
    assert done.out.startswith("On 16 rows (16 predictions) fp4 moves")
    assert storage_of(load(tmp_path / "merged")[0])["storage"] == "fp4"


def test_4_bits_without_rows_to_measure_on_and_rows_without_4_bits(finished_run, refused, tmp_path):
    adapter = finished_run / "adapter"
    assert refused("merge", adapter, tmp_path / "m", "--storage", "nf4") == (
        f"{adapter} has no held-out rows on which to measure what rounding changes; give some with --check."
    )
    assert refused("merge", finished_run, tmp_path / "m", "--check", "rows.jsonl") == (
        "--check measures what 8 bits or fewer change, and the merged model is kept in fp32."
    )
    assert not (tmp_path / "m").exists()


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
