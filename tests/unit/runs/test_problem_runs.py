"""Runs over texts with several labels and over numbers: learned, kept by a resume, evaluated, predicted, reported."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from rich.console import Console

import veneer
from veneer.commands.generate import answers
from veneer.errors import ConfigError, DataError
from veneer.evaluation.numbers import NumberScores
from veneer.reporting.run_page import run_page
from veneer.runs.facts import read_facts
from veneer.runs.folder import RunFolder
from veneer.runs.opened import open_named
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit

_WORDS = [a + b for a in "bcdfgklm" for b in ("at", "ig", "op", "un", "ed", "ar")]
SEVERAL = [
    {"text": word, "labels": [*(["early"] if word[0] < "g" else []), *(["open"] if word[1] in "ao" else [])]}
    for word in _WORDS
]  # fmt: skip
NUMBERS = [{"text": word, "label": (2.5 if word[0] < "g" else -1) + (0.5 if word[1] in "ao" else 0)} for word in _WORDS]
QUIET = Console(file=io.StringIO())


def train(model, folder, rows, **options):
    console = Console(file=io.StringIO(), width=500)
    given = {
        "data": rows, "output": str(folder), "steps": 60, "batch_size": 16, "held_out": 8, "learning_rate": 1e-2,
        "evaluate_every": 20,
    }  # fmt: skip
    result = veneer.train(str(model), console=console, **{**given, **options})
    return result, console.file.getvalue()


@pytest.fixture(scope="module")
def several(tiny_encoder, tmp_path_factory):
    return train(tiny_encoder, tmp_path_factory.mktemp("several") / "run", SEVERAL)


@pytest.fixture(scope="module")
def numbers(tiny_encoder, tmp_path_factory):
    return train(tiny_encoder, tmp_path_factory.mktemp("numbers") / "run", NUMBERS, task="regression")


def test_several_labels_are_learned(several):
    result, shown = several
    assert "2 labels, any of which a row may have: early 24, open 24. 12 rows have none of them." in shown
    assert result.model.config.problem_type == "multi_label_classification"
    assert result.model.config.id2label == {0: "early", 1: "open"}
    assert result.loss_after < 0.8 * result.loss_before
    assert result.accuracy is not None  # of the rows whose labels are all right
    rows = RunFolder(result.folder).rows()
    assert (rows["problem"], rows["classes"], rows["shape"]) == ("multi-label", ["early", "open"], "text/labels")


def test_numbers_are_learned(numbers):
    result, shown = numbers
    assert "The labels are numbers from -1 to 3, with a mean of 1." in shown
    assert (result.model.config.problem_type, result.model.config.num_labels) == ("regression", 1)
    assert result.loss_after < 0.5 * result.loss_before
    assert result.accuracy is None
    rows = RunFolder(result.folder).rows()
    assert (rows["problem"], rows["classes"], rows["shape"]) == ("regression", ["LABEL_0"], "text/number")


def test_several_labels_are_measured(several):
    folder = several[0].folder
    found = veneer.evaluate(folder, examples=3)
    assert found.adapter.micro_f1 >= found.base.micro_f1
    assert found.adapter.perplexity is None
    assert found.adapter.choice_accuracy is None
    assert [score.label for score in found.adapter.classes.scores] == ["early", "open"]
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["adapter"]["micro_f1"] == found.adapter.micro_f1
    assert all({*answer.adapter.split(", ")} <= {"early", "open", ""} for answer in found.examples)
    shown = [table.title for table in found.tables()]
    assert shown == ["8 held-out rows", "each label, adapter"]
    page = run_page(folder)
    assert "F1 over all rows and labels (micro)" in page
    assert "Confusion matrix" not in page
    assert read_facts(folder / "adapter").scores["micro_f1"][1] == found.adapter.micro_f1
    # The share of rows with all labels right is the accuracy that the run measured on the way.
    assert found.adapter.exact_match == several[0].accuracy


def test_numbers_are_measured(numbers):
    folder = numbers[0].folder
    found = veneer.evaluate(folder, examples=2)
    assert found.adapter.numbers.mse == pytest.approx(found.adapter.loss, rel=1e-5)
    assert found.adapter.numbers.mse < found.base.numbers.mse
    assert isinstance(found.adapter.numbers, NumberScores)
    assert all(float(answer.adapter) is not None for answer in found.examples)
    assert "Spearman correlation" in run_page(folder)
    assert "mean squared error" in repr(found)
    assert read_facts(folder / "adapter").scores["mae"][1] == found.adapter.numbers.mae
    card = (folder / "adapter" / "README.md").read_text()
    assert "It gives a number for a text." in card
    assert "problem_type='regression'" in card


def test_other_rows_are_read_as_the_runs_were(several, numbers, tmp_path):
    for (result, _), rows in ((several, SEVERAL), (numbers, NUMBERS)):
        path = tmp_path / f"{result.folder.parent.name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
        assert veneer.evaluate(result.folder, data=str(path), examples=0).rows == 12
        assert veneer.evaluate(result.folder / "adapter", data=str(path), examples=0).rows == 12


def test_predicted_labels_are_those_above_one_half(several, tmp_path):
    result, _ = several
    found = veneer.predict(result.folder, data=SEVERAL, console=QUIET, keep=["text"])
    assert found.labels == ("early", "open")
    for each in found:
        assert each.labels == tuple(name for name, share in each.probabilities.items() if share > 0.5)
    assert any(sum(each.probabilities.values()) > 1.01 for each in found)
    for suffix in ("jsonl", "csv", "parquet"):
        veneer.predict(
            result.folder, data=SEVERAL, output=str(tmp_path / f"out.{suffix}"), keep=["text"], console=QUIET
        )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [[*each.labels] for each in found]
    assert set(lines[0]) == {"text", "prediction", "probability_early", "probability_open"}
    assert json.loads((tmp_path / "out.csv").read_text().splitlines()[1].split(",", 1)[1].rsplit(",", 2)[0].strip('"')
                      .replace('""', '"')) == [*found[0].labels]  # fmt: skip
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table["prediction"].to_pylist() == [[*each.labels] for each in found]


def test_predicted_numbers(numbers, tmp_path):
    result, _ = numbers
    found = veneer.predict(result.folder, data=[{"text": row["text"]} for row in NUMBERS], console=QUIET,
                           output=str(tmp_path / "out.jsonl"))  # fmt: skip
    assert found.labels == ()
    assert "numbers" in repr(found)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [each.number for each in found]
    model, ids = result.model, open_named(result.folder).renderer.tokenizer(NUMBERS[0]["text"], return_tensors="pt")
    with torch.no_grad():
        wanted = float(model(**ids).logits)
    assert found[0].number == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ConfigError, match="The model is a classifier, to which labels does nothing: it gives a number"):
        veneer.predict(result.folder, data=NUMBERS, labels=["a", "b"], console=QUIET)


def test_an_interrupted_prediction_goes_on(several, numbers, tmp_path, monkeypatch):
    from veneer.prediction.answers import Classes

    for (result, _), rows in ((several, SEVERAL), (numbers, NUMBERS)):
        name = str(tmp_path / f"{result.folder.parent.name}.jsonl")
        whole = veneer.predict(result.folder, data=rows, output=name, batch_tokens=8, console=QUIET)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        plain = Classes.of

        def some(self, left, plain=plain):
            for number, part in enumerate(plain(self, left)):
                if number == 3:
                    raise KeyboardInterrupt
                yield part

        with monkeypatch.context() as patch:
            patch.setattr(Classes, "of", some)
            with pytest.raises(KeyboardInterrupt):
                veneer.predict(result.folder, data=rows, output=name, batch_tokens=8, console=QUIET)
        again = veneer.predict(result.folder, data=rows, output=name, batch_tokens=8, console=QUIET)
        assert again.reused > 0
        assert again.predictions == whole.predictions
        assert (tmp_path / name).read_bytes() == content


def test_one_text_is_answered(several, numbers):
    (said,) = answers(several[0].folder, "bat").values()
    assert set(said.probabilities) == {"early", "open"}
    assert all(f"{name} (" in str(said) for name, share in said.probabilities.items() if share > 0.5)
    (number,) = answers(numbers[0].folder, "bat").values()
    assert float(number.text) == pytest.approx(3, abs=2.5)
    assert number.probabilities is None


def test_an_adapter_stands_alone_and_goes_on(several, numbers, tmp_path):
    for (result, _), task, rows in ((several, "multi-label", SEVERAL), (numbers, "regression", NUMBERS)):
        alone = tmp_path / task
        shutil.copytree(result.folder / "adapter", alone)
        opened = open_named(alone)
        assert (read_facts(alone).task, opened.renderer.problem) == (task, task)
        assert json.loads((alone / "veneer.json").read_text())["version"] == 3
        console = Console(file=io.StringIO())
        more = veneer.train(
            adapter=str(alone), data=rows, output=str(tmp_path / f"more-{task}"), steps=2, held_out=4, console=console
        )
        assert more.model.config.id2label == result.model.config.id2label
        merged, _ = veneer.load(alone)
        veneer.merge(merged)
        merged.save_pretrained(tmp_path / f"merged-{task}")
        written = json.loads((tmp_path / f"merged-{task}" / "config.json").read_text())
        assert written["problem_type"] == result.model.config.problem_type


@pytest.mark.parametrize(("rows", "more"), [(SEVERAL, {}), (NUMBERS, {"task": "regression"})])
def test_a_stopped_run_resumes_to_the_same_bytes(rows, more, tiny_encoder, tmp_path):
    how = {"schedule": "constant", "warmup": 0, "checkpoint_every": 3, "dropout": 0.1, **more}
    whole, _ = train(tiny_encoder, tmp_path / "whole", rows, steps=6, **how)
    train(tiny_encoder, tmp_path / "half", rows, steps=3, **how)
    veneer.resume(tmp_path / "half", steps=6, console=QUIET)
    one, other = (RunFolder(path).adapter / "adapter_model.safetensors" for path in (whole.folder, tmp_path / "half"))
    assert one.read_bytes() == other.read_bytes()


def test_a_language_model_gets_such_a_head_too(tiny_folder, tmp_path):
    result, _ = train(tiny_folder, tmp_path / "labels", SEVERAL, steps=2, task="multi-label", storage="nf4")
    assert type(result.model).__name__ == "LlamaForSequenceClassification"
    assert veneer.predict(result.folder, data=SEVERAL[:3], console=QUIET).labels == ("early", "open")
    result, _ = train(tiny_folder, tmp_path / "number", NUMBERS, steps=2, task="regression")
    assert result.model.config.num_labels == 1


def test_full_fine_tuning_writes_a_model_that_says_what_it_is_asked(tiny_encoder, tmp_path):
    result, _ = train(tiny_encoder, tmp_path / "run", NUMBERS, steps=3, task="regression", method="full")
    assert json.loads((result.folder / "model" / "config.json").read_text())["problem_type"] == "regression"
    assert veneer.evaluate(result.folder, examples=0).adapter.numbers.mae > 0


def test_one_label_a_row_may_be_learned_as_several(tiny_encoder, tmp_path):
    rows = [{"text": row["text"], "label": "yes" if row["text"][0] < "g" else "no"} for row in NUMBERS]
    result, shown = train(tiny_encoder, tmp_path / "run", rows, steps=2, task="multi-label")
    assert "2 labels, any of which a row may have: no 24, yes 24." in shown
    assert result.model.config.problem_type == "multi_label_classification"


def test_the_plan_knows_the_head(tiny_encoder, veneer_command, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SEVERAL))
    outcome = veneer_command("plan", tiny_encoder, "--data", path)
    assert outcome.code == 0, outcome
    outcome = veneer_command("plan", tiny_encoder, "--task", "regression", "--max-length", 32)
    assert outcome.code == 0, outcome


def test_inspect_counts(veneer_command, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SEVERAL))
    shown = veneer_command("inspect", path).out
    assert "labels: early 24, open 24" in shown
    assert "a row may have several of these labels; 12 have none" in shown
    path.write_text("".join(json.dumps(row) + "\n" for row in NUMBERS))
    assert "label is a float (2.5)" in veneer_command("inspect", path).out
    shown = veneer_command("inspect", path, "--shape", "text/number").out
    assert "The labels are numbers from -1 to 3" in shown


@pytest.mark.parametrize(
    ("rows", "options", "error", "match"),
    [
        (SEVERAL, {"task": "regression"}, DataError, r"has a list of labels, and task: regression learns one number"),
        (NUMBERS, {"task": "multi-label"}, DataError, r"label is a float .*task: regression"),
        (NUMBERS, {"task": "regression", "label_smoothing": 0.1}, ConfigError, "label_smoothing spreads a class over"),
        (NUMBERS, {"task": "regression", "class_weights": "balanced"}, ConfigError, "and this model is regression"),
        (SEVERAL, {"class_weights": {"opne": 2}}, DataError, r"names 'opne', which is none .*: early, open.*'open'"),
    ],
)
def test_what_does_not_fit_is_refused(rows, options, error, match, tiny_encoder, tmp_path):
    with pytest.raises(error, match=match):
        train(tiny_encoder, tmp_path / "run", rows, steps=1, **options)


def test_an_adapter_that_chooses_one_class_is_not_given_several(finished_classifier, tmp_path):
    start = str(finished_classifier / "adapter")
    with pytest.raises(DataError, match="the model chooses one class; train a new one with task: multi-label"):
        veneer.train(adapter=start, data=SEVERAL, output=str(tmp_path / "run"), steps=1, console=QUIET)


def test_a_model_that_writes_text_is_not_given_lists_of_labels(tiny_folder, tmp_path):
    with pytest.raises(DataError, match=r"has a list of labels, and a model that writes text .* task: multi-label"):
        train(tiny_folder, tmp_path / "run", SEVERAL, steps=1)


def test_what_others_call_it():
    with pytest.raises(ConfigError, match=r"problem_type.*task"):
        TrainConfig(model="m", data="d", output="o", problem_type="regression")
