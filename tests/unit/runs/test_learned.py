"""A run says whether it learned: accuracy beside the loss, and a sentence for each thing that went wrong."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
import torch
from rich.console import Console

import veneer
from page_reader import Page
from veneer.commands.watch import screen
from veneer.data.formats import Example
from veneer.reporting.run_page import run_page
from veneer.runs.folder import RunFolder
from veneer.runs.history import RunHistory
from veneer.runs.learned import ROWS, HeldOutLabels, advice, largest_class
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


FALLING = [{"step": step + 1, "loss": 3 - 2 * step / 40} for step in range(40)]


@pytest.mark.parametrize(
    ("losses", "best_step", "todo"),
    [
        (
            (2.0, 1.9),
            20,
            "Look at the rows with veneer inspect, and take more steps or a higher rate, --learning-rate 0.0009.",
        ),
        ((2.0, 2.5), 20, "The training loss did not fall: take a lower rate, --learning-rate 0.0001."),
        ((2.0, 0.1), 20, "does not hold for other rows: look at the rows with veneer inspect, and give more of them."),
        ((2.0, 0.1), 10, "look at the rows with veneer inspect, and give more of them, or take fewer steps."),
    ],
    ids=["hardly", "rose", "of these rows only", "and too long"],
)
def test_a_run_that_is_no_better_than_the_largest_class_says_so(losses, best_step, todo):
    metrics = [{"step": step + 1, "loss": losses[step >= 10]} for step in range(20)]
    metrics += [{"step": step, "held_out_accuracy": share} for step, share in ((0, 0.7), (10, 0.47), (20, 0.47))]
    config = run_config(steps=20, learning_rate=3e-4)
    (said,) = advice(config, _Labels(largest=0.58), metrics, best_step)
    assert said.startswith(
        "It has not learned the labels: 47 % of the held-out rows are right, and always answering the largest class "
        "would be right in 58 %. "
    )
    assert said.endswith(todo)
    assert advice(config, _Labels(largest=0.47), metrics, best_step), "no better is not learned"
    assert advice(config, _Labels(largest=0.46), metrics, best_step) == ()


def test_held_out_rows_of_one_class_that_are_all_right_say_nothing():
    metrics = [{"step": 1, "loss": 1.0}, {"step": 1, "held_out_accuracy": 1.0}]
    assert advice(run_config(steps=1), _Labels(largest=1.0), metrics, 1) == ()


def test_the_weights_that_are_kept_are_judged():
    metrics = [{"step": 20, "held_out_accuracy": 0.9}, {"step": 40, "held_out_accuracy": 0.3}]
    assert advice(run_config(steps=40), _Labels(), metrics, 20) == ()


def test_answers_that_are_no_label_are_counted():
    (said,) = advice(run_config(steps=40), _Labels(strange=(5, 16)), [], 0)
    assert said.startswith("5 of 16 answers to held-out rows are none of the 2 labels: ")
    (said,) = advice(run_config(steps=40), _Labels(strange=(1, 2)), [], 0)
    assert said.startswith("1 of 2 answers to held-out rows is none of the 2 labels: ")


@pytest.mark.parametrize(
    ("options", "more"),
    [({"steps": 40}, "--steps 80"), ({"epochs": 2}, "--epochs 4"), ({"epochs": 0.3}, "--epochs 0.6")],
)
def test_a_loss_that_still_fell_asks_for_more_steps(options, more):
    assert advice(run_config(**options), _Labels(), FALLING, 40) == (
        "The loss was still falling at the end, from 1.5 to 1.05 over the last 10 of 40 steps: more steps would help, "
        f"{more}.",
    )
    assert advice(run_config(**options), _Labels(), FALLING, 20) == (), "the held-out loss rose, or patience ended it"


def test_the_largest_class():
    assert largest_class([Example("x", prompt="p", answer=f" {answer}") for answer in "aab"]) == pytest.approx(2 / 3)


def test_many_rows_are_measured_in_part(tiny_folder):
    rows = [Example(f"{n}", prompt=f"{n}:", answer=" ab"[n % 2]) for n in range(5 * ROWS)]
    labels = HeldOutLabels(None, type("R", (), {"classes": (), "problem": ""})(), [], rows, 8)
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
    assert result.advice
    assert text.rstrip().endswith("\n".join(result.advice))
    assert result.accuracy == next(r["held_out_accuracy"] for r in records if r["step"] == result.best_step)
    assert (
        f"held-out accuracy {100 * result.accuracy:.1f} % (largest class {100 * result.largest_class:.1f} %)"
        in repr(result)
    )
    _is_in_its_reports(result, records)

    monkeypatch.setattr(HeldOutLabels, "accuracy", lambda self: None)
    torch.manual_seed(7)
    other = veneer.train(tiny_folder, output=tmp_path / "other", console=Console(quiet=True), **options)
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (result.folder, other.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def _is_in_its_reports(result, records):
    folder, history = RunFolder(result.folder), RunHistory.read(result.folder)
    assert json.loads(folder.advice_file.read_text()) == {"advice": list(result.advice)}
    assert history.advice == list(result.advice)
    assert history.largest_class == folder.rows()["largest_class"] == result.largest_class
    page = Page(run_page(result.folder))
    notes = [p.whole_text() for p in page.root.all("p") if p.attributes.get("role") == "note"]
    assert notes == list(result.advice)
    measured, largest = page.charts()["accuracy"]["series"]
    assert measured["points"] == [[r["step"], 100 * r["held_out_accuracy"]] for r in records]
    assert largest["points"] == [[r["step"], 100 * result.largest_class] for r in records]
    shown = io.StringIO()
    Console(file=shown, width=1000).print(screen(history, 1000))
    said = f"{100 * records[-1]['held_out_accuracy']:.1f} % at step 6, largest class {100 * result.largest_class:.1f} %"
    assert re.search(rf"accuracy +{re.escape(said)}  [▁-█]{{3}}\n", re.sub(r" +\n", "\n", shown.getvalue()))
    assert all(sentence in shown.getvalue() for sentence in result.advice)


def test_a_run_that_learned_says_nothing_and_its_tile_has_the_accuracy(finished_run):
    assert json.loads(RunFolder(finished_run).advice_file.read_text()) == {"advice": []}
    assert RunHistory.read(finished_run).advice == []
    tiles = Page(run_page(finished_run)).root.all("dl")[0].whole_text()
    assert "Held-out accuracy100.0 %at step 100, the largest class is 56.2 %" in tiles


@pytest.mark.parametrize("text", ['{"advice": "text"}', "[]", "{"])
def test_a_damaged_file_of_advice_is_none(finished_run, tmp_path, text):
    run = shutil.copytree(finished_run, tmp_path / "run")
    RunFolder(run).advice_file.write_text(text)
    assert RunHistory.read(run).advice == []


def test_what_a_run_said_before_it_goes_on_is_not_shown(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    RunFolder(run).advice_file.write_text('{"advice": ["More steps would help."]}')
    assert RunHistory.read(run).advice == ["More steps would help."]
    (run / "adapter" / "adapter_config.json").unlink()
    assert (RunHistory.read(run).phase, RunHistory.read(run).advice) == ("stopped", [])


def test_a_classifier_and_a_task_without_labels(tiny_encoder, tiny_folder, labelled, rows_file, tmp_path):
    quiet = Console(quiet=True)
    result = veneer.train(tiny_encoder, output=tmp_path / "classifier", steps=4, console=quiet, **labelled)
    assert all("held_out_accuracy" in r for r in RunFolder(result.folder).metrics() if "held_out_loss" in r)
    texts = [{"text": f"a text of its own, number {n}"} for n in range(30)]
    result = veneer.train(tiny_folder, data=texts, output=tmp_path / "texts", steps=4, held_out=8, console=quiet)
    assert not any("held_out_accuracy" in record for record in RunFolder(result.folder).metrics())
