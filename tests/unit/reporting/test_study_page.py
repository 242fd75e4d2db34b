"""veneer report of a study: its rows, charts of the means over its seeds, and its findings."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from page_reader import Page
from veneer.reporting.study_page import study_charts, study_page

pytestmark = pytest.mark.unit

HEAD = ["run", "how", "rank", "seed", "loss", "accuracy", "parameters"]
ROWS = [
    {
        "run": f"{how}-{rank}-{seed}", "how": how, "rank": rank, "seed": seed, "loss": 0.5 / rank + seed / 64,
        "accuracy": None if how == "cut" else 0.75 + rank / 64, "parameters": 1000 * rank,
    }
    for how in ("trained", "cut")
    for rank in (1, 8, 2)
    for seed in (0, 1)
]  # fmt: skip
MEANINGS = {"loss": "held-out loss, nats; lower is better", "rank": "of every matrix"}


@pytest.fixture
def study(tmp_path):
    """A function that writes a study's folder, changed as given."""

    def make(rows=ROWS, head=HEAD, **fields):
        folder = tmp_path / "rank"
        folder.mkdir(exist_ok=True)
        said = {
            "name": "rank", "title": "Which rank is enough?", "model": "m", "data": "d", "finished": True,
            "columns": MEANINGS, "rows": len(rows), "findings": "Rank 2 is enough.", "plots": ["rank.png"],
            "environment": {"torch": "2"}, "options": {"seeds": [0, 1]}, "date": "2026-11-25",
        } | fields  # fmt: skip
        (folder / "study.json").write_text(json.dumps(said))
        (folder / "rank.png").write_bytes(b"\x89PNG and so on")
        lines = [",".join("" if row[name] is None else str(row[name]) for name in head) for row in rows]
        (folder / "runs.csv").write_text("\n".join([",".join(head), *lines]) + "\n")
        return folder

    return make


def test_the_page_of_a_study(study, veneer_command):
    folder = study()
    assert veneer_command("report", folder).code == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.fetched() == []
    assert page.root.all("h1")[0].whole_text() == "Which rank is enough?"
    assert "Rank 2 is enough." in page.section("found").whole_text()
    assert list(page.charts()) == ["column-loss", "column-accuracy", "column-parameters"]
    (picture,) = page.section("plots").all("img")
    assert str(picture.attributes["src"]).startswith("data:image/png;base64,iVBORw") or picture.attributes["alt"]
    rows, meanings = page.section("rows").all("table")
    assert rows.rows()[0] == HEAD
    assert len(rows.rows()) == 1 + len(ROWS)
    assert rows.rows()[-1][5] == "", "what was not measured is empty"
    assert ["rank", "of every matrix"] in meanings.rows()


def test_points_are_means_over_the_seeds_and_the_seeds_beside_them(study):
    loss = Page(study_page(study())).charts()["column-loss"]
    assert (loss["x"], loss["y"], loss["kind"]) == ("rank", "held-out loss, nats", "line")
    series = {one["name"]: one for one in loss["series"]}
    assert list(series) == ["trained", "cut", "trained, each", "cut, each"]
    assert [x for x, _ in series["cut"]["points"]] == ["1", "2", "8"]
    expected = [fmean(r["loss"] for r in ROWS if r["how"] == "cut" and r["rank"] == rank) for rank in (1, 2, 8)]
    assert [y for _, y in series["cut"]["points"]] == pytest.approx(expected)
    assert len(series["cut, each"]["points"]) == 6
    assert series["cut, each"]["mean"] == "cut"


def test_rows_of_other_options_are_left_out(study):
    """They stay in the file, for a study that asks for them; their means are none of this one's."""
    other = [{**row, "run": f"other-{row['run']}", "loss": row["loss"] / 2} for row in ROWS]
    own = [row["run"] for row in ROWS]
    page = Page(study_page(study([*other, *ROWS], runs=own)))
    alone = Page(study_page(study(runs=own)))
    assert page.charts() == alone.charts()
    assert f"{len(other)} rows of runs.csv are of other options, and left out." in page.root.whole_text()
    assert "left out" not in alone.root.whole_text()


def test_numbers_are_x_rather_than_as_many_names():
    head = ["run", "how", "rank", "seed", "loss"]
    rows = [dict(zip(head, (f"{how}{rank}", how, rank, 0, rank + len(how) / 8), strict=True))
            for how in ("trained", "cut") for rank in (1, 2)]  # fmt: skip
    (chart,) = study_charts(head, rows, {})
    assert (chart.x, [one.name for one in chart.series]) == ("rank", ["trained", "cut"])


def test_a_column_that_follows_from_x_makes_no_series():
    head = ["run", "matrices", "rank", "ranks", "seed", "accuracy"]
    rows = [
        {
            "run": str(n),
            "matrices": name,
            "rank": 4 if len(name) > 1 else 8,
            "ranks": "{}",
            "seed": 0,
            "accuracy": n / 8,
        }
        for n, name in enumerate(["q", "k", "qv", "mlp"])
    ]
    (chart,) = study_charts(head, rows, {})
    assert (chart.x, chart.kind, [one.name for one in chart.series]) == ("matrices", "scatter", ["accuracy"])
    assert chart.series[0].points == [("q", 0.0), ("k", 0.125), ("qv", 0.25), ("mlp", 0.375)]


def test_x_is_chosen_among_the_rows_that_have_the_measurement():
    """As in a study of several kinds of rows: what one kind has is empty in the others."""
    head = ["run", "what", "rank", "matrix", "energy", "seed", "loss"]
    rows = [
        *(dict(zip(head, ("a", "part", rank, None, rank / 16 - 0.01, 0, 1 / rank), strict=True)) for rank in (1, 2, 4)),
        *(dict(zip(head, ("b", "matrix", 9, f"m{n}", n / 100 + 0.001, 0, None), strict=True)) for n in range(50)),
        dict(zip(head, ("c", "full", None, None, None, 0, 0.125), strict=True)),
    ]
    energy, loss = study_charts(head, rows, {})
    assert (loss.x, [one.name for one in loss.series]) == ("rank", ["loss"])
    assert loss.series[0].points == [("1", 1.0), ("2", 0.5), ("4", 0.25)]
    assert (energy.x, energy.y) == ("rank", "energy"), "fifty names are too many for an axis"
    rows = [{**row, "tuning": n % 2} for n, row in enumerate(ROWS * 2)]
    first_large = sorted(ROWS, key=lambda row: -row["rank"])
    assert study_charts(HEAD, first_large, {})[0].categories == ("1", "2", "8")
    (chart, *_) = study_charts(["run", "how", "rank", "tuning", "seed", "loss"], rows[: len(ROWS)], {})
    assert chart.x == "rank"
    assert {one.name for one in chart.series if not one.mean} == {
        f"{how}, tuning {tuning}" for how in ("trained", "cut") for tuning in (0, 1)
    }


def test_a_long_value_is_cut_in_the_table(study):
    rows = [{**row, "how": "x" * 99} for row in ROWS]
    (table, *_) = Page(study_page(study(rows))).section("rows").all("table")
    assert table.rows()[1][1] == "x" * 59 + "…"


def test_a_study_that_goes_on(study, refused):
    folder = study(rows=[], finished=False, findings="", plots=["../secret.png", "gone.png"])
    page = Page(study_page(folder))
    text = page.root.whole_text()
    assert "not finished" in text
    assert "Nothing yet" in text
    assert "There are no numbers to draw yet." in text
    assert "The plot gone.png is not in the folder." in text
    assert "The plot ../secret.png is not in the folder." in text
    (folder / "runs.csv").unlink()
    assert Page(study_page(folder)).charts() == {}
    (folder / "runs.csv").write_text("run,seed\na\n")
    assert refused("report", folder) == f"{folder / 'runs.csv'}: row 1 has not the 2 columns of the first line."
    (folder / "study.json").write_text("[]")
    assert refused("report", folder) == (f"{folder / 'study.json'} cannot be read: Input should be a valid dictionary")
    (folder / "study.json").write_text("{")
    assert "cannot be read: Expecting" in refused("report", folder)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=',"'), min_size=1, max_size=30))
def test_no_text_is_taken_for_markup(text, study):
    hostile = f"</script><b x='{text}'>&amp;"
    rows = [{**row, "how": hostile if row["how"] == "cut" else row["how"]} for row in ROWS]
    page = Page(study_page(study(rows, findings=hostile, title=hostile, columns={"loss": hostile})))
    assert page.section("found").all("p")[0].whole_text() == hostile
    assert page.root.all("h1")[0].whole_text() == hostile
    assert page.charts()["column-loss"]["series"][1]["name"] == hostile
    assert page.root.all("b") == []


def test_inspect_says_what_a_study_is(study, veneer_command):
    folder = study()
    said = veneer_command("inspect", folder).out
    assert f"{folder}: 0 runs, finished; veneer report {folder}" in said
    assert "Rank 2 is enough." in said


def test_a_table_that_is_no_text_is_refused(study, refused):
    folder = study()
    (folder / "runs.csv").write_bytes(b"run,seed\n\xff,1\n")
    assert f"{folder / 'runs.csv'} cannot be read as CSV: 'utf-8' codec" in refused("report", folder)
    (folder / "runs.csv").write_text("run,seed\n" + "x" * 200_000 + ",1\n")
    assert f"{folder / 'runs.csv'} cannot be read as CSV: field larger" in refused("report", folder)
