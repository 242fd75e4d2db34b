"""veneer report RUN RUN: what differs, the scores and the curves on one page that fetches nothing."""

from __future__ import annotations

import json
import shutil

import pytest

from page_reader import Page
from veneer.reporting.compared import RunsCompared
from veneer.reporting.compared_page import compared_page

pytestmark = pytest.mark.unit

STATE = {"step": 20, "worse": 0, "data": "0123456789abcdef"}


def _saved(folder, **state):
    checkpoint = folder / "checkpoints" / "step-000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({**STATE, **state}))
    return folder


@pytest.fixture
def two(run_folder):
    """A finished run and a shorter one of another rank, on the same rows."""
    first, second = run_folder(20, name="first"), run_folder(12, name="second", rank=16, learning_rate="auto")
    (first / "adapter").mkdir()
    (first / "adapter" / "adapter_config.json").write_text("{}")
    (first / "evaluation.json").write_text(json.dumps({"adapter": {"loss": 0.5, "choice_accuracy": 0.75}}))
    rows = {"steps": 20, "train": 90, "held_out": 10, "chosen": {"learning_rate": 0.003}}
    (second / "rows.json").write_text(json.dumps(rows))
    (second / "environment.json").write_text(json.dumps({"torch": "9.9"}))
    return _saved(first), _saved(second)


def test_the_page_of_two_runs(two, veneer_command):
    first, second = two
    done = veneer_command("report", first, second)
    file = first.parent / "comparison.html"
    assert (done.code, done.err) == (0, "")
    assert "first" in done.out
    assert "Lowest held-out loss: first, 0.400.\n" in done.out
    assert done.out.endswith(f"Comparison of 2 runs written to {file}; open it in a browser.\n")
    page = Page(file.read_text(encoding="utf-8"))
    assert page.fetched() == []
    assert [h.whole_text() for h in page.root.all("h1")] == ["first, second"]
    tables = {table.all("caption")[0].whole_text(): table.rows() for table in page.root.all("table")}
    assert tables["Options that differ"] == [
        ["option", "first", "second"], ["rank", "8", "16"],
        ["learning_rate", "auto", "auto: 0.003"],
    ]  # fmt: skip
    scores = {row[0]: row[1:] for row in tables["Scores, time and memory of each run"]}
    assert scores["state"] == ["finished, 20 steps", "stopped, 12 of 20 steps"]
    assert scores["held-out loss before"] == ["3.250", "3.250"]
    assert scores["held-out loss"] == ["0.400 at step 20", "0.550 at step 10"]
    assert scores["evaluated loss"] == ["0.5", ""]
    assert scores["evaluated choice accuracy"] == ["75.0 %", ""]
    assert scores["peak memory"] == ["1.50 GB", "1.50 GB"]
    assert "evaluated exact match" not in scores
    assert tables["Versions and machine, where they differ"][1] == ["torch", "none", "9.9"]
    assert ["model", "some/base"] in tables["Options that are the same in all, and not the default"]
    charts = page.charts()
    assert [one["name"] for one in charts["held-out-loss"]["series"]] == ["first", "second"]
    assert charts["held-out-loss"]["series"][0]["points"] == [[0, 3.25], [10, 0.55], [20, 0.4]]
    assert len(charts["loss"]["series"][1]["points"]) == 12
    assert "accuracy" not in charts


def test_what_auto_chose_differs(two):
    compared = RunsCompared.read(two)
    assert ["rank", "8", "16"] in compared.differing


def test_losses_of_other_rows_are_not_ranked(two, run_folder, veneer_command):
    third = _saved(run_folder(20, name="third", data="others.jsonl", seed=2), data="other")
    done = veneer_command("report", two[0], third, "--output", two[0] / "page.html")
    said = (
        "These runs are not known to have the same rows as the same tokens (data, seed differ), so their losses need "
        "not compare."
    )
    assert "Lowest" not in done.out
    assert f"\n{said}\n" in done.out
    assert said in (two[0] / "page.html").read_text()


def test_runs_of_one_name_are_called_by_their_paths(two, tmp_path):
    other = shutil.copytree(two[0], tmp_path / "other" / "first")
    compared = RunsCompared.read([two[0], other])
    assert compared.labels == [str(two[0]), str(other)]
    assert compared.differing == []
    assert "All options of these runs are the same." in compared_page(compared)


def test_runs_without_a_step_and_long_ones_have_a_page(run_folder, tmp_path):
    nothing, long = run_folder(0, name="nothing"), run_folder(120, name="<b>long", total=120)
    compared = RunsCompared.read([nothing, long])
    charts = Page(compared_page(compared)).charts()
    assert len(charts["loss"]["series"]) == 1
    assert "means of several" in charts["loss"]["note"]
    assert "<b>long" not in compared_page(compared)
    again = RunsCompared.read([nothing, run_folder(0, name="more")])
    assert "No step has been measured yet." in compared_page(again)


def test_rows_from_memory_are_compared_by_what_they_are(run_folder):
    def given(name, text):
        folder = run_folder(0, name=name)
        (folder / "data.jsonl").write_text(text)
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("data: rows.jsonl", f"data: {folder}/data.jsonl"))
        return folder

    one, same, other = given("one", "a"), given("same", "a"), given("other", "b")
    assert RunsCompared.read([one, same]).differing == []
    (row,) = RunsCompared.read([one, other]).differing
    assert row == ["data", "rows from memory (ca978112)", "rows from memory (3e23e816)"]


def test_what_cannot_be_compared_is_refused(two, refused, tmp_path):
    first, second = two
    assert refused("report", first, first) == (
        f"{first} is given twice; name each run once, or one alone for its own page."
    )
    assert refused("report", first, tmp_path / "secnd") == (
        f"{tmp_path}/secnd is no run: it has no config.yaml. Did you mean '{second}'?"
    )
    study = tmp_path / "study"
    study.mkdir()
    (study / "study.json").write_text("{}")
    assert refused("report", first, study) == (
        f"{study} is a study, which has a page of its own, veneer report {study}; only runs are compared."
    )
    assert "Missing argument 'RUN…|STUDY'" in refused("report", code=2)
