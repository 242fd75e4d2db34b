"""veneer evaluate: the figures, as a table, as one JSON object, and in the run's folder."""

from __future__ import annotations

import json
import shutil

import pytest

import veneer
from veneer.commands.evaluate import evaluate

pytestmark = pytest.mark.unit


def test_json_is_one_object_and_nothing_else(finished_run, veneer_command):
    done = veneer_command("evaluate", finished_run, "--json", "--exact-match")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert set(found) == {"rows", "choices", "base", "adapter", "examples", "data", "trained", "lower_is_better"}
    assert (found["rows"], found["choices"]) == (16, [" no", " yes"])
    assert found["adapter"]["choice_accuracy"] == found["adapter"]["exact_match"] == 1.0
    assert found["base"]["loss"] > 5 > 0.1 > found["adapter"]["loss"]
    assert json.loads((finished_run / "evaluation.json").read_text()) == found


def test_from_python(finished_run):
    comparison = evaluate(finished_run, examples=0)
    assert comparison.as_json() == json.loads((finished_run / "evaluation.json").read_text())
    assert (comparison.rows, comparison.examples) == (16, [])
    with pytest.raises(veneer.VeneerError, match=r"has no option 'exmples'\. Did you mean 'examples'\?"):
        evaluate(str(finished_run), exmples=0)
    with pytest.raises(veneer.VeneerError, match=r"^evaluate takes a path .* as run, not the int 3"):
        evaluate(3)


def test_the_table(finished_run, veneer_command):
    done = veneer_command("evaluate", finished_run, "--batch-size", 5)
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0] == "16 held-out rows"
    assert any(line.startswith("│ choice accuracy (2 labels) │ ") and line.endswith(" 100.0 % │") for line in lines)
    assert "exact match" not in done.out


def test_other_rows(finished_run, veneer_command, refused, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "bet:", "completion": " yes"}\n' * 2)
    done = veneer_command("evaluate", finished_run, "--data", path, "--json")
    found = json.loads(done.out)
    assert (found["rows"], found["choices"], found["data"]) == (2, [], str(path))
    assert found["adapter"]["exact_match"] is None
    assert "--exact-match generates one for every row" in done.err
    message = refused("evaluate", finished_run, "--data", tmp_path / "othr.jsonl")
    assert message == f"There is no file {tmp_path / 'othr.jsonl'}. Did you mean '{path}'?"
    assert refused("evaluate", finished_run, "--batch-size", 0).startswith(
        "EvaluateOptions: batch_size = '0' is not valid"
    )


def test_examples_are_answers_side_by_side(finished_run, veneer_command):
    found = json.loads(veneer_command("evaluate", finished_run, "--examples", 4, "--json").out)
    assert len(found["examples"]) == 4
    for example in found["examples"]:
        assert example["expected"] == example["adapter"] == ("yes" if example["prompt"][0] < "g" else "no")
        assert example["base"] != example["adapter"]
    assert len({example["where"] for example in found["examples"]}) == 4
    assert json.loads(veneer_command("evaluate", finished_run, "--examples", 0, "--json").out)["examples"] == []
    assert len(json.loads(veneer_command("evaluate", finished_run, "--examples", 99, "--json").out)["examples"]) == 16


def test_a_classifier(finished_classifier, veneer_command):
    found = json.loads(veneer_command("evaluate", finished_classifier, "--json").out)
    assert found["choices"] == ["no", "yes"]
    assert found["adapter"]["choice_accuracy"] > 0.8
    assert all(example["chosen"] and example["adapter"] in ("no", "yes") for example in found["examples"])


def test_what_is_no_finished_run(finished_run, tiny_folder, refused, tmp_path):
    alone = shutil.copytree(tiny_folder, tmp_path / "alone" / "model")
    assert refused("evaluate", alone) == f"{alone} is not a run folder: it has no config.yaml."
    assert refused("evaluate", finished_run / "adapter") == (
        f"{finished_run / 'adapter'} is an adapter alone, without the rows of its run; give rows with --data."
    )
    near = finished_run.with_name("rum")
    assert refused("evaluate", near) == (
        f"{near} is not a run folder: it has no config.yaml. Did you mean '{finished_run}'?"
    )
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    assert refused("evaluate", run) == f"{run} has no adapter yet; finish the run: veneer train --resume {run}"


def test_a_run_without_held_out_rows(tiny_folder, rows_file, tmp_path, refused):
    run = tmp_path / "run"
    veneer.train(str(tiny_folder), data=str(rows_file), output=str(run), steps=1, held_out=0)
    assert refused("evaluate", run) == f"{run} was trained without held-out rows; give some with --data."


def test_an_adapter_that_was_damaged(finished_run, refused, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"junk")
    assert "adapter_model.safetensors is damaged or cut short and cannot be read" in refused("evaluate", run)


def test_a_figure_that_cannot_be_written_is_a_sentence(finished_run, refused, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "evaluation.json").unlink(missing_ok=True)
    (run / "evaluation.json").mkdir()
    assert refused("evaluate", run) == f"{run / 'evaluation.json'}: Is a directory"
