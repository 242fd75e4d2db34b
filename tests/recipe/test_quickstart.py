"""docs/quickstart.ipynb, executed by a kernel of this interpreter as a person would execute it."""

from __future__ import annotations

import html
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from veneer.files import cache_folder
from veneer.planning import machine
from veneer.planning.ledger import KINDS

nbformat = pytest.importorskip("nbformat", reason="the notebook needs a kernel: pip install -e '.[dev]'")
nbclient = pytest.importorskip("nbclient", reason="the notebook needs a kernel: pip install -e '.[dev]'")
pytest.importorskip("ipykernel", reason="the notebook needs a kernel: pip install -e '.[dev]'")

pytestmark = pytest.mark.recipe

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
RIGHT = {
    "three bottles of juice": "juice | 3 | bottles",
    "seven bottles of wine": "wine | 7 | bottles",
    "five boxes of candles": "candles | 5 | boxes",
    "two bags of cement": "cement | 2 | bags",
}


class _Client(nbclient.NotebookClient):
    """Counts the messages of each cell by kind: an output that was replaced leaves no other trace."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.messages: dict[str, list[str]] = {}

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        self.messages.setdefault(cell.id, []).append(msg["header"]["msg_type"])
        return super().process_message(msg, cell, cell_index)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def client(folder, smollm2):
    """The notebook after all its cells. ``smollm2`` has been loaded, so the kernel finds it converted in the cache."""
    before = _files(ROOT / "docs")
    with pytest.MonkeyPatch.context() as patch:
        _kernel_of_this_interpreter(folder, patch)
        _machine_as_if_measured(folder, patch)
        (folder / "work").mkdir()
        client = _Client(
            nbformat.read(NOTEBOOK, as_version=4), timeout=300, kernel_name="python3",
            resources={"metadata": {"path": str(folder / "work")}},
        )  # fmt: skip
        client.execute()
    assert _files(ROOT / "docs") == before
    return client


def _files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


def _kernel_of_this_interpreter(folder, patch):
    """A kernel named python3 that is found before any installed one, and nothing of the user's settings."""
    spec = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": command, "display_name": "this Python", "language": "python"}))
    patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        patch.setenv(name, str(folder / name.lower()))


def _machine_as_if_measured(folder, patch):
    """Measuring takes a minute; tests/unit/planning does it. In a cache of its own, with the session's models."""
    models = cache_folder() / "gguf"
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    rates = {kind: 1e11 if kind in ("products", "attention") else 1e10 for kind in KINDS}
    machine.remember(machine._FILE, machine._key(), asdict(machine.Machine(rates, 1e-6, 4 * 10**8, 4 * 10**8)))
    (cache_folder() / "gguf").symlink_to(models)


def _cell(client, name):
    return next(cell for cell in client.nb.cells if cell.id == name)


def _html(client, name):
    return [output.data["text/html"] for output in _cell(client, name).outputs if "text/html" in output.get("data", {})]


def _answers(client, name):
    """Order → answer, of a cell that asks."""
    (output,) = _cell(client, name).outputs
    return dict(re.findall(r"^(.+): '(.*)'$", output.text, re.MULTILINE))


def test_every_cell_runs_without_warnings(client):
    """Apart from tqdm's, which transformers imports: it warns where ipywidgets is not installed."""
    code = [cell for cell in client.nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    said = [output.text for output in outputs if output.get("name") == "stderr"]
    assert [text for text in said if "IProgress not found" not in text] == []


def test_the_answers_are_wrong_before_and_right_after(client):
    for name in ("before", "disabled"):
        answers = _answers(client, name)
        assert list(answers) == list(RIGHT)
        assert not set(answers.values()) & set(RIGHT.values())
    assert _answers(client, "before") == _answers(client, "disabled")
    for name in ("after", "again", "merge"):
        assert _answers(client, name) == RIGHT


def test_what_is_asked_is_in_no_row(client, folder):
    (run,) = (folder / "work" / "runs").iterdir()
    rows = [json.loads(line) for line in (run / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 45
    assert not [order for order in RIGHT if any(order in row["prompt"] for row in rows)]
    goods = {answer.partition(" ")[0] for answer in RIGHT.values()}
    assert not [item for item in goods if any(item in row["completion"] for row in rows)]


def test_the_plan_is_a_table_with_its_verdict(client):
    (table,) = _html(client, "plan")
    assert table.startswith("<table><caption>smollm2-135m-instruct: It fits: ")
    assert "The run of 20 steps: " in table


def test_the_run_has_one_live_line_and_ends_with_a_link_to_its_report(client, folder):
    sent, shown = client.messages["train"], _html(client, "train")
    texts = [html.unescape(re.sub("<[^>]*>", "", output)).strip() for output in shown]
    assert sent.count("update_display_data") == 19
    assert sent.count("display_data") == len(texts) < 15
    (live,) = [text for text in texts if re.match(r"step \d+/20  loss", text)]
    assert live.startswith("step 20/20  loss ")
    assert live.endswith("0:00 left")
    link = re.fullmatch(r"Report: <a href='([^']+)' target='_blank'>(.+)</a>", shown[-1])
    assert link
    page = folder / "work" / unquote(link[1])
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert page.parent.parent == folder / "work" / "runs"


def test_the_result_is_a_table(client):
    (table,) = _html(client, "result")
    assert "A finished run" in table
    before, after = map(float, re.search(r"([\d.]+) → ([\d.]+)", table).groups())
    assert after < 0.1 < 1 < before


def test_nothing_but_the_run_is_left(client, folder):
    assert [path.name for path in (folder / "work").iterdir()] == ["runs"]
