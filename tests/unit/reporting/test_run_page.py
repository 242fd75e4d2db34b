"""veneer report of a run: whole, self-contained, equal to what was measured, and safe with any text."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import veneer
from page_reader import Page
from veneer.commands.report import report
from veneer.reporting.charts import displayed
from veneer.reporting.page import ASSETS, LIBRARY
from veneer.reporting.run_page import run_page
from veneer.runs.folder import RunFolder
from veneer.training.metrics import Metrics

pytestmark = pytest.mark.unit

SECTIONS = ["asked", "curves", "memory", "ranks", "measured", "load"]


@pytest.fixture(scope="module")
def measured_run(finished_run, tmp_path_factory):
    """A finished and evaluated run of its own folder."""
    from veneer.commands.evaluate import evaluate

    run = shutil.copytree(finished_run, tmp_path_factory.mktemp("measured") / "run")
    evaluate(run, examples=3)
    return run


def test_the_page_of_a_run_is_whole_and_fetches_nothing(measured_run, veneer_command):
    done = veneer_command("report", measured_run)
    file = measured_run / "report.html"
    assert (done.code, done.err) == (0, "")
    assert done.out == f"Report written to {file}; open it in a browser.\n"
    page = Page(file.read_text(encoding="utf-8"))
    assert page.fetched() == []
    assert [s.attributes["aria-labelledby"] for s in page.root.all("section")] == SECTIONS
    (policy,) = (e for e in page.root.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy")
    assert str(policy.attributes["content"]).startswith("default-src 'none';")
    assert [h.whole_text() for h in page.root.all("h1")] == ["run"]
    assert "Finished after 100 of 100 steps." in page.root.whole_text()
    assert not [p for p in measured_run.iterdir() if p.name.startswith(".veneer-tmp-")]


def test_a_screen_reader_is_told_all(measured_run):
    page = Page(run_page(measured_run))
    assert page.root.all("html")[0].attributes["lang"] == "en"
    for table in page.root.all("table"):
        assert table.children[0].tag == "caption" or table.all("caption")
        assert all("scope" in cell.attributes for cell in table.all("th"))
    drawn = [e for e in page.root.all("div") if e.attributes.get("role") == "img"]
    assert len(drawn) == len(page.charts()) == 6
    assert all(len(str(e.attributes["aria-label"])) > 40 for e in drawn)
    ids = [e.attributes["id"] for e in page.every() if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    assert {e.attributes["aria-labelledby"] for e in page.root.all("section")} <= set(ids)
    levels = [int(e.tag[1]) for e in page.every() if e.tag in ("h1", "h2", "h3", "h4")]
    assert all(after <= before + 1 for before, after in pairwise(levels)), "a level is left out"


def test_the_curves_are_the_metrics(measured_run):
    charts, records = Page(run_page(measured_run)).charts(), RunFolder(measured_run).metrics()
    steps = [record for record in records if "loss" in record]
    series = {one["name"]: one["points"] for one in charts["loss"]["series"]}
    assert series["training"] == [[record["step"], record["loss"]] for record in steps]
    held_out = [[record["step"], record["held_out_loss"]] for record in records if "held_out_loss" in record]
    assert series["held-out rows"] == held_out
    assert len(held_out) == 6
    for name, key in {
        "learning-rate": "learning_rate", "gradient-norm": "gradient_norm", "speed": "tokens_per_second",
    }.items():  # fmt: skip
        assert charts[name]["series"][0]["points"] == [[record["step"], record[key]] for record in steps]
    memory = charts["memory"]["series"][0]["points"]
    assert memory == [[record["step"], record["peak_memory"] / 1e9] for record in steps]


@pytest.mark.parametrize("classes", [{"scores": 3, "confusion": []}, "text"])
def test_scores_of_labels_that_cannot_be_read_are_left_out_with_a_note(measured_run, tmp_path, classes):
    run = shutil.copytree(measured_run, tmp_path / "run")
    values = json.loads((run / "evaluation.json").read_text())
    values["adapter"]["classes"] = classes
    (run / "evaluation.json").write_text(json.dumps(values))
    page = Page(run_page(run))
    assert len(page.section("measured").all("table")) == 1
    assert "The scores of the labels in evaluation.json could not be read (" in page.root.whole_text()


def test_the_tables_hold_the_same_numbers(measured_run):
    page, records = Page(run_page(measured_run)), RunFolder(measured_run).metrics()
    (table,) = (t for t in page.section("curves").all("table") if t.rows()[0][:2] == ["step", "training"])
    rows = table.rows()
    assert rows[0] == ["step", "training", "training, mean of 5 steps", "held-out rows"]
    losses = {record["step"]: displayed(record["loss"]) for record in records if "loss" in record}
    assert {int(row[0]): row[1] for row in rows[1:] if row[1]} == losses


def test_before_and_after_with_examples(measured_run):
    page, found = Page(run_page(measured_run)), json.loads((measured_run / "evaluation.json").read_text())
    section = page.section("measured")
    table, labels, confusion = section.all("table")
    classes = found["adapter"]["classes"]
    assert [row[0] for row in labels.rows()[1:]] == [score["label"] for score in classes["scores"]]
    assert [row[1:] for row in confusion.rows()[1:]] == [[str(count) for count in row] for row in classes["confusion"]]
    rows = {row[0]: row[1:] for row in table.rows()}
    assert rows["choice accuracy"] == [f"{100 * found[side]['choice_accuracy']:.1f} %" for side in ("base", "adapter")]
    assert rows["loss (mean of a learned token, nats)"][1] == displayed(found["adapter"]["loss"])
    assert len(section.all("article")) == len(found["examples"]) == 3
    for article, example in zip(section.all("article"), found["examples"], strict=True):
        texts = [block.whole_text() for block in article.all("pre")]
        assert texts == [example[name] for name in ("prompt", "expected", "base", "adapter")]
        assert example["expected"] == example["adapter"] != example["base"]
    assert "16 held-out rows" in section.whole_text()


def test_the_options_that_were_changed_come_first(measured_run):
    changed, machine, *_, every = Page(run_page(measured_run)).section("asked").all("table")
    given = dict(changed.rows()[1:])
    assert given["steps"] == "100"
    assert given["train_also"] == '["lm_head", "embed_tokens"]'
    assert "weight_decay" not in given
    assert dict(every.rows()[1:])["weight_decay"] == "0.0"
    assert dict(machine.rows()[1:])["torch"]


def test_ranks_of_adalora_layer_by_module(tiny_folder, rows_file, tmp_path):
    run = tmp_path / "run"
    veneer.train(
        str(tiny_folder), data=str(rows_file), output=str(run), method="adalora", initial_rank=4, target_rank=2,
        steps=20, evaluate_every=10, held_out=8, batch_size=8, learning_rate=1e-2,
    )  # fmt: skip
    page = Page(run_page(run))
    (table,) = page.section("ranks").all("table")
    head, *rows = table.rows()
    last = [record["ranks"] for record in RunFolder(run).metrics() if "ranks" in record][-1]
    shown_ranks = {
        f"{row[0]}.{kind}": int(rank)
        for row in rows
        for kind, rank in zip(head[1:], row[1:], strict=True)
    }  # fmt: skip
    assert shown_ranks == {
        f"{name.split('.')[2]}.{name.split('.')[-1]}": rank for name, rank in last.items() if rank
    } | {name: 0 for name, rank in shown_ranks.items() if not rank}
    assert {"budget", "orthogonality"} <= set(page.charts())
    assert f"{sum(last.values())} triplets among 14 matrices" in page.section("ranks").whole_text()


def test_where_the_models_own_weights_were_trained_no_adapter_is_spoken_of(tiny_folder, rows_file, tmp_path):
    from veneer.commands.evaluate import evaluate

    run = tmp_path / "run"
    options = {"data": str(rows_file), "output": str(run), "method": "full", "steps": 20, "held_out": 8}
    veneer.train(str(tiny_folder), **options, evaluate_every=20, batch_size=8, learning_rate=1e-2)
    found = evaluate(run, examples=1)
    assert [column.header for column in found.table().columns] == ["", "base", "trained model"]
    text = Page(run_page(run)).root.whole_text()
    assert "Base and trained model on the same rows" in text
    assert "the trained model of step 20 is kept" in text
    assert "adapter" not in Page(run_page(run)).section("measured").whole_text().lower()


def test_a_run_in_progress_and_one_that_stopped(run_folder):
    folder = run_folder(12)
    text = Page(run_page(folder)).root.whole_text()
    assert f"Not finished: stopped after 12 of 20 steps. Go on with: veneer train --resume {folder}" in text
    assert "There is no adapter yet" in text
    metrics = Metrics(RunFolder(folder).metrics_file, RunFolder(folder).tensorboard, 12)
    assert "In progress, after 12 of 20 steps." in Page(run_page(folder)).root.whole_text()
    metrics.close()
    assert "Not finished" in Page(run_page(folder)).root.whole_text()


def test_a_run_of_which_there_is_only_the_config(run_folder):
    page = Page(run_page(run_folder(0, files={})))
    assert page.charts() == {}
    text = " ".join(page.root.whole_text().split())
    for said in (
        "Starting: no step was measured yet.", "No step has been measured yet.", "the run's folder holds no plan",
        "nothing yet", "Not measured yet.", "No ranks are known",
    ):  # fmt: skip
        assert said in text


def test_how_to_load_is_left_out_where_the_adapters_config_is_damaged(measured_run, tmp_path):
    folder = shutil.copytree(measured_run, tmp_path / "run")
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": 5}))
    text = Page(run_page(folder)).root.whole_text()
    assert "train_also.0 = 5 is not valid" in text
    assert "PeftModel" not in text


def test_damaged_lines_are_told_and_cost_nothing_else(run_folder):
    folder = run_folder(12)
    file = RunFolder(folder).metrics_file
    whole = Page(run_page(folder)).charts()
    file.write_text(file.read_text() + '{"step": 13, "loss": 0.')
    page = Page(run_page(folder))
    assert page.charts() == whole
    assert "metrics.jsonl ends within a line" in page.root.whole_text()
    lines = file.read_text().splitlines()
    lines[3] = "\x00" * 20
    file.write_text("\n".join(lines[:-1]) + "\n")
    page = Page(run_page(folder))
    assert "metrics.jsonl: 1 line could not be read" in page.root.whole_text()
    assert [x for x, _ in page.charts()["loss"]["series"][0]["points"]] == [1, 2, *range(4, 13)]
    (folder / "environment.json").write_text("{")
    assert "environment.json could not be read" in Page(run_page(folder)).root.whole_text()


def test_memory_predicted_and_measured(run_folder):
    plan = {"peak": 1_650_000_000, "terms": {"base": 540_000_000}}
    page = Page(run_page(run_folder(12, files={"plan.json": plan})))
    assert dict(page.section("memory").all("table")[0].rows()[1:]) == {
        "predicted before the run": "1.65 GB", "of it base": "0.54 GB", "measured": "1.50 GB",
        "predicted over measured": "+10.0 %",
    }  # fmt: skip
    assert page.charts()["memory"]["series"][1] == {
        "name": "predicted", "points": [[1, 1.65], [20, 1.65]], "faint": False, "mean": "",
    }  # fmt: skip


HOSTILE = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40),
    st.sampled_from(
        [
            "</script><script>alert(1)</script>", "<!--<script>", "]]>", "<img src=https://example.com/x onerror=f()>",
            "{{ 7*7 }}", "{% raw %}", '" onmouseover="alert(1)', "' x='", "&lt;b&gt;", "\u2028</style>", "&#x3c;",
            "\\u003c",
        ]
    ),
)  # fmt: skip


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(HOSTILE, min_size=8, max_size=8))
def test_no_text_is_taken_for_markup(texts, run_folder, tmp_path):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    data, value, key, where, prompt, expected, base, adapter = texts
    example = {
        "where": where,
        "prompt": prompt,
        "expected": expected,
        "base": base,
        "adapter": adapter,
        "chosen": False,
    }
    scores = {"loss": 1.0, "perplexity": 2.7}
    folder = run_folder(
        3, data=data or "rows", files={
            "environment.json": {f"key {key}": value},
            "evaluation.json": {"rows": 1, "base": scores, "adapter": scores, "examples": [example], "data": where},
        },
    )  # fmt: skip
    page = Page(run_page(folder))
    plain = _outline(Page(run_page_of_plain_text(folder)))
    assert _outline(page) == plain, "no text makes or ends an element"
    assert page.fetched() == []
    article = page.section("measured").all("article")[0]
    assert [block.whole_text() for block in article.all("pre")] == [prompt, expected, base, adapter]
    assert article.all("h4")[0].whole_text() == where
    changed, machine, *_ = page.section("asked").all("table")
    assert dict(changed.rows()[1:])["data"] == (data or "rows")
    assert machine.rows()[1] == [f"key {key}", value]


def run_page_of_plain_text(folder):
    """The same run's page with plain words for its texts."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["examples"] = [
        {name: "a word" if isinstance(value, str) else value for name, value in evaluation["examples"][0].items()}
    ]
    evaluation["data"] = "a word"
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "environment.json").write_text('{"key": "a word"}')
    return run_page(folder)


def _outline(page):
    return [(element.tag, sorted(element.attributes)) for element in page.every()]


def test_the_scripts_hold_nothing_that_would_end_them():
    for file in (LIBRARY, ASSETS / "page.js"):
        text = file.read_text(encoding="utf-8").lower()
        assert "</script" not in text
        assert "<!--" not in text
    assert "6.1.0" in LIBRARY.read_text(encoding="utf-8")
    assert "</style" not in (ASSETS / "page.css").read_text()


def test_what_is_neither_run_nor_study(run_folder, tmp_path, refused, veneer_command):
    folder = run_folder(3)
    near = tmp_path / "rum"
    assert refused("report", near) == (
        f"{near} is neither a run nor a study: it has no config.yaml and no study.json. Did you mean '{folder}'?"
    )
    out = tmp_path / "elsewhere" / "page.html"
    assert veneer_command("report", folder, "--output", out).code == 0
    assert out.is_file()
    assert not (folder / "report.html").exists()
    (folder / "config.yaml").write_text("model: [")
    assert "cannot be read as YAML" in refused("report", folder)
    assert report(run_folder(3, name="by-python")).name == "report.html"
