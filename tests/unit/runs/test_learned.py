"""A run says whether it learned: accuracy beside the loss, and a sentence for each thing that went wrong."""

from __future__ import annotations

import io
import json
import random
from itertools import pairwise

import pytest
import torch
from rich.console import Console

import veneer
from veneer.data.formats import Example
from veneer.runs.folder import RunFolder
from veneer.runs.learned import ROWS, HeldOutLabels, advice, largest_class, still_falls
from veneer.training.automatic import Size, automatic
from veneer.training.config import RunConfig, TrainConfig

pytestmark = pytest.mark.unit


def run_config(**options):
    asked = TrainConfig(**{"model": "m", "data": "d", "output": "o", **options})
    return RunConfig.of(asked, automatic(asked, Size(64, 10, 8)))


class _Labels(HeldOutLabels):
    """Of a run whose answers are given here."""

    def __init__(self, largest=0.5, strange=(0, 16)):
        self.labels, self.largest, self._strange = ["a", "b"], largest, strange

    def strange_answers(self):
        return self._strange


def curve(*parts, noise=0.0):
    """Losses that go from one value to the next in ten steps each."""
    numbers = random.Random(0)
    pairs = pairwise(parts)
    return [a + (b - a) * i / 10 + noise * numbers.gauss(0, 1) for a, b in pairs for i in range(10)]


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        (curve(4, 3, 2, 1, 0.5), True),
        (curve(4, 3, 2, 1, 0.5, noise=0.05), True),
        (curve(4, 1, 1, 1, 1), False),
        (curve(1, 1, 1, 1, 1, noise=0.3), False),
        (curve(4, 2, 1.1, 1.02, 1), False),
        (curve(1, 2, 3, 4, 5), False),
        (curve(6, 0.01, 0.002, 0.001, 0.0001), False),
        ([4.0, 3.0, 2.0, 1.0], False),
    ],
    ids=[
        "falling",
        "falling, noisy",
        "flat",
        "flat, noisy",
        "the tail of a schedule",
        "rising",
        "learned",
        "too few to say",
    ],
)
def test_a_loss_still_falls_or_not(losses, falls):
    assert still_falls(losses) is falls


def test_a_run_that_is_no_better_than_the_largest_class_says_so():
    metrics = [{"step": 0, "held_out_accuracy": 0.1}, {"step": 40, "held_out_accuracy": 0.47}]
    (said,) = advice(run_config(steps=40), _Labels(largest=0.58), metrics, 40)
    assert said.startswith("It has not learned the labels: 47 % of the held-out rows are right, and always answering ")
    assert "58 %" in said
    assert advice(run_config(steps=40), _Labels(largest=0.4), metrics, 40) == ()


def test_the_weights_that_are_kept_are_judged():
    metrics = [{"step": 20, "held_out_accuracy": 0.9}, {"step": 40, "held_out_accuracy": 0.3}]
    assert advice(run_config(steps=40), _Labels(), metrics, 20) == ()


def test_answers_that_are_no_label_are_counted():
    (said,) = advice(run_config(steps=40), _Labels(strange=(5, 16)), [], 0)
    assert said.startswith("5 of 16 answers to held-out rows are none of the 2 labels: ")


@pytest.mark.parametrize(("options", "more"), [({"steps": 40}, "--steps 80"), ({"epochs": 2}, "--epochs 4")])
def test_a_loss_that_still_fell_asks_for_more_steps(options, more):
    metrics = [{"step": i + 1, "loss": loss} for i, loss in enumerate(curve(4, 3, 2, 1, 0.5))]
    assert advice(run_config(**options), _Labels(), metrics, 40) == (
        f"The loss was still falling at the end: more steps would help, {more}.",
    )
    assert advice(run_config(**options), _Labels(), metrics, 20) == (), "the held-out loss rose: more steps would not"


def test_the_largest_class():
    assert largest_class([Example("x", prompt="p", answer=f" {answer}") for answer in "aab"]) == pytest.approx(2 / 3)


def test_many_rows_are_measured_in_part(tiny_folder):
    rows = [Example(f"{n}", prompt=f"{n}:", answer=" ab"[n % 2]) for n in range(5 * ROWS)]
    labels = HeldOutLabels(None, type("R", (), {"classes": ()})(), [], rows, 8)
    assert len(labels.rows) == ROWS


@pytest.fixture
def labelled(tmp_path):
    file = tmp_path / "labelled.jsonl"
    rows = [{"prompt": f"{n} of {n % 2}:", "completion": (" yes", " no")[n % 2]} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": str(file), "held_out": 20, "batch_size": 8, "learning_rate": 1e-2}


def test_accuracy_is_beside_the_loss_and_changes_no_byte(tiny_folder, labelled, tmp_path, monkeypatch):
    out, kept = io.StringIO(), []

    class Keeps:
        def on_step(self, record):
            pass

        def on_evaluation(self, record):
            kept.append(record.accuracy)

    options = {**labelled, "steps": 6, "evaluate_every": 3, "dropout": 0.1}
    result = veneer.train(
        tiny_folder, output=tmp_path / "run", console=Console(file=out, width=200), callbacks=[Keeps()], **options
    )
    records = [record for record in RunFolder(result.folder).metrics() if "held_out_loss" in record]
    assert kept == [record["held_out_accuracy"] for record in records]
    assert len(kept) == 3
    assert all(0 <= share <= 1 for share in kept)
    text = out.getvalue()
    assert "2 labels; the largest is " in text
    assert f"step 6: held-out loss {records[-1]['held_out_loss']:.4f}, {100 * kept[-1]:.1f} % right" in text
    assert all(sentence in text for sentence in result.advice)

    monkeypatch.setattr(HeldOutLabels, "accuracy", lambda self: None)
    torch.manual_seed(7)
    other = veneer.train(tiny_folder, output=tmp_path / "other", console=Console(quiet=True), **options)
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (result.folder, other.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_classifier_and_a_task_without_labels(tiny_encoder, tiny_folder, labelled, rows_file, tmp_path):
    quiet = Console(quiet=True)
    result = veneer.train(tiny_encoder, output=tmp_path / "classifier", steps=4, console=quiet, **labelled)
    assert all("held_out_accuracy" in r for r in RunFolder(result.folder).metrics() if "held_out_loss" in r)
    texts = [{"text": f"a text of its own, number {n}"} for n in range(30)]
    result = veneer.train(tiny_folder, data=texts, output=tmp_path / "texts", steps=4, held_out=8, console=quiet)
    assert not any("held_out_accuracy" in record for record in RunFolder(result.folder).metrics())
