"""The report page in headless Chromium: on a desk, on a phone, in the dark and on paper. Skipped without one."""

from __future__ import annotations

import json
import shutil

import pytest

from veneer.reporting.run_page import run_page
from veneer.reporting.study_page import study_page
from veneer.runs.folder import RunFolder

pytestmark = pytest.mark.unit

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
_PHONE = {"viewport": {"width": 375, "height": 700}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        yield found
        found.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function from HTML and how it is looked at to the page; at the end nothing was said or asked for."""
    said, asked, contexts = [], [], []

    def open_page(html, **how):
        file = tmp_path / "report.html"
        file.write_text(html, encoding="utf-8")
        contexts.append(browser.new_context(**how))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def _drawn(page):
    """Chart → the number of its lines and marks, by what the browser draws."""
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".chart")].map(
            (chart) => [chart.id.slice(6), chart.querySelectorAll("svg path").length]))"""
    )


def _extent(page, name):
    """The x axis of a chart as it is now."""
    return page.evaluate(
        """(name) => echarts.getInstanceByDom(document.getElementById(name))
            .getModel().getComponent("xAxis").axis.scale.getExtent()""",
        f"chart-{name}",
    )


@pytest.fixture
def adalora(run_folder):
    folder = run_folder(60, total=60, method="adalora", files={"plan.json": {"peak": 1_600_000_000}})
    lines = [
        {**r, "budget": 84, "orthogonality_deviation": 0.1} if "loss" in r else r for r in RunFolder(folder).metrics()
    ]
    ranks = {f"model.layers.{layer}.{kind}": layer + 1 for layer in range(4) for kind in ("q_proj", "v_proj")}
    lines.append({"step": 60, "ranks": ranks, "importance": {}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_every_chart_is_drawn_and_tells_its_numbers(opened, adalora):
    page = opened(run_page(adalora), viewport={"width": 1280, "height": 900})
    drawn = _drawn(page)
    assert set(drawn) == {"loss", "learning-rate", "gradient-norm", "speed", "memory", "budget", "orthogonality"}
    assert all(count > 5 for count in drawn.values()), drawn
    chart = page.locator("#chart-speed")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator("#chart-speed > div:nth-child(2)")
    tip.wait_for(state="visible")
    assert tip.inner_text().startswith("step ")
    assert tip.inner_text().rstrip().endswith(("100", "200"))


def test_a_part_is_zoomed_into_and_left_again(opened, adalora):
    page = opened(run_page(adalora), viewport={"width": 1280, "height": 900})
    whole = _extent(page, "speed")
    chart = page.locator("#chart-speed")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    bottom = box["y"] + box["height"] - 13  # the middle of the handles
    left = page.evaluate("""() => { const grid = echarts.getInstanceByDom(document.getElementById("chart-speed"))
        .getModel().getComponent("grid").coordinateSystem.getRect(); return grid.x; }""")
    page.mouse.move(box["x"] + left + 2, bottom)
    page.mouse.down()
    page.mouse.move(box["x"] + left + 150, bottom, steps=5)
    page.mouse.up()
    page.wait_for_timeout(300)  # the slider throttles what it tells
    assert _extent(page, "speed")[0] > whole[0]
    page.evaluate("""() => echarts.getInstanceByDom(document.getElementById("chart-speed"))
        .dispatchAction({type: "restore"})""")
    assert _extent(page, "speed") == whole


def test_on_a_phone_nothing_is_wider_than_the_screen(opened, adalora):
    page = opened(run_page(adalora), **_PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert all(count > 5 for count in _drawn(page).values())
    assert page.evaluate("document.querySelector('.chart svg').getBoundingClientRect().width") <= 375
    page.locator("summary", has_text="Speed as a table").tap()
    assert page.locator("#chart-speed ~ details table").is_visible()


def test_in_the_dark_text_is_light(opened, adalora):
    page = opened(run_page(adalora), color_scheme="dark")
    lightness = page.evaluate(
        """() => [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor].map(
            (colour) => colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0))"""
    )
    assert lightness[0] > 600 > 150 > lightness[1]
    labels = page.evaluate("""() => document.querySelector("#chart-speed svg text").getAttribute("fill")""")
    assert labels == "#c9d0d9"


def test_on_paper_the_charts_fit_and_are_dark_on_white(opened, adalora):
    page = opened(run_page(adalora), color_scheme="dark", viewport={"width": 1280, "height": 900})
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    drawn = _drawn(page)
    assert all(count > 3 for count in drawn.values()), drawn
    sizes = page.evaluate(
        """() => [...document.querySelectorAll("figure")].map((figure) => {
            const svg = figure.querySelector("svg").getBoundingClientRect(), own = figure.getBoundingClientRect();
            return [svg.width, svg.height, own.width, own.height]; })"""
    )
    for width, height, own_width, own_height in sizes:
        assert 100 < width <= own_width + 1
        assert 60 < height < own_height
    assert page.evaluate("""() => document.querySelector("#chart-speed svg text").getAttribute("fill")""") == "#333333"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("""() => document.querySelector("#chart-speed svg").hasAttribute("viewBox")""") is False


def test_hostile_text_runs_nothing(opened, run_folder):
    text = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    page = opened(run_page(run_folder(3, data=text, files={"environment.json": {text: text}})))
    assert page.title() == f"run: some/base on {text} (veneer)"
    assert page.locator("img").count() == 0


def test_a_studys_charts_are_drawn(opened, tmp_path):
    name = "<b>cut</b>"
    study = {"name": "rank", "findings": "Some.", "finished": True, "columns": {"accuracy": "share of rows"}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    rows = [
        f"{n},{how},{2**n},{seed},0.{n + 1}{seed}" for n in range(3) for how in ("trained", name) for seed in (0, 1)
    ]
    (tmp_path / "runs.csv").write_text("\n".join(["run,how,rank,seed,accuracy", *rows]))
    page = opened(study_page(tmp_path), viewport={"width": 1000, "height": 900})
    assert _drawn(page)["column-accuracy"] > 10
    legend = page.locator("#chart-column-accuracy svg text").all_text_contents()
    assert "trained" in legend
    assert name in legend
    page.evaluate("""() => echarts.getInstanceByDom(document.getElementById("chart-column-accuracy"))
        .dispatchAction({type: "showTip", seriesIndex: 1, dataIndex: 2})""")
    tip = page.locator("#chart-column-accuracy > div:nth-child(2)")
    assert name in tip.inner_text()
    assert tip.locator("b").count() >= 1, "the value; the name is text"
