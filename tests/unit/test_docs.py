"""The documents are true: their code runs and prints what they show, their commands parse, their links and files
exist, and no option is left out.

The convention of a page: its ```python blocks run in order, in one namespace and one empty folder. A ```text block
right after one is what it prints; right after a ```bash block of one veneer command, it is what that command prints,
and the command runs. In such a block … stands for any text, and a line that is only … for any lines. A code block after
a comment `<!-- not run: reason -->` is left out, and counted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
import yaml

import veneer
from veneer.cli import cli, main
from veneer.commands.flags import given
from veneer.data.formats import SHAPES
from veneer.generation.config import GenerateOptions
from veneer.planning.ledger import KINDS
from veneer.planning.machine import Machine
from veneer.runs.train import RESUMABLE
from veneer.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, *(ROOT / f"{name}.md" for name in ("ARCHITECTURE", "CONTRIBUTING", "SECURITY", "CHANGELOG"))]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
REAL_MODEL = "smollm2-135m-instruct"
MOST_NOT_RUN = 0

_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    line: int
    not_run: bool
    printed: str | None = None  # the ```text block right after it


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    fences = list(_FENCE.finditer(text))
    for fence, after in zip(fences, [*fences, None][1:], strict=True):
        shown = after is not None and after["language"] == "text" and not text[fence.end() : after.start()].strip()
        line = text[: fence.start("body")].count("\n") + 1
        printed = after["body"] if after is not None and shown else None
        found.append(Block(fence["language"], fence["body"], line, fence["reason"] is not None, printed))
    return found


def commands(body: str) -> list[list[str]]:
    """The words of each command of a ```bash block, less what is the shell's: comments, continuations, redirections."""
    lines = re.sub(r" >>? \S+", "", body.replace("\\\n", " ").replace(" && ", "\n")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def is_run(block: Block) -> bool:
    """Whether the page's test runs the block: all Python, and single veneer commands whose output is shown."""
    if block.not_run:
        return False
    if block.language == "bash" and block.printed is not None:
        said = commands(block.body)
        return len(said) == 1 and said[0][0] == "veneer"
    return block.language == "python"


def _pages() -> list[object]:
    """Each page with code that runs, marked by whether it needs the real model."""
    cases = []
    for page in PAGES:
        run = [block for block in blocks(page) if is_run(block)]
        real = any(REAL_MODEL in block.body for block in run)
        if run:
            cases.append(pytest.param(page, marks=pytest.mark.recipe if real else pytest.mark.unit, id=page.name))
    return cases


@pytest.fixture
def real_model_from_a_folder(request, monkeypatch):
    """The packaged model in the form that loads in a moment, under the name that the pages use."""
    if request.node.get_closest_marker("recipe"):
        folder = request.getfixturevalue("smollm2_folder")
        monkeypatch.setattr("veneer.models.source.packaged_path", lambda name: folder)


@pytest.fixture
def machine_as_if_measured(monkeypatch):
    """Measuring takes a minute; tests/unit/planning does it, and what a page shows of it is any number."""
    rates = {kind: 1e11 if kind in ("products", "attention") else 1e10 for kind in KINDS}
    monkeypatch.setattr("veneer.commands.plan.measured", lambda **_: Machine(rates, 1e-6, 4 * 10**8, 4 * 10**8))


@pytest.mark.parametrize("page", _pages())
@pytest.mark.usefixtures("real_model_from_a_folder", "machine_as_if_measured")
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    namespace: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in (block for block in blocks(page) if is_run(block)):
            said = _python(page, block, namespace) if block.language == "python" else _command(block, monkeypatch)
            if block.printed is not None:
                assert _fits(said, block.printed), f"{page.name}:{block.line} prints\n{said}\nand not\n{block.printed}"


def _python(page: Path, block: Block, namespace: dict[str, object]) -> str:
    # Empty lines before it give a traceback the page's own line numbers.
    code = compile("\n" * (block.line - 1) + block.body, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, namespace)
    return out.getvalue()


def _command(block: Block, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", commands(block.body)[0])
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                print(f"(exit code {ended.code})", file=out)
    return out.getvalue()


def _fits(said: str, shown: str) -> bool:
    """Whether ``said`` is ``shown``, but for space at the ends of lines and for what … stands for."""
    pattern = []
    for line in shown.rstrip().splitlines():
        any_lines = line.strip() == "…"
        pattern.append(r"(?:.*\n)*?" if any_lines else ".*".join(map(re.escape, line.rstrip().split("…"))) + "\n")
    lines = "".join(line.rstrip() + "\n" for line in said.rstrip().splitlines())
    return re.fullmatch("".join(pattern), lines) is not None


@pytest.mark.unit
def test_a_text_block_is_compared_exactly_apart_from_ellipses():
    assert _fits("a 1\nb\n", "a 1\nb\n")
    assert _fits("loss 0.123 · 40 tokens/s\n", "loss … tokens/s\n")
    assert _fits("a\nb\nc\nd\n", "a\n…\nd\n")
    assert not _fits("a 1\n", "a 2\n")
    assert not _fits("a\nb\n", "a\n")
    assert not _fits("a\n", "a\nb\n")


@pytest.mark.unit
def test_nearly_every_block_runs():
    left_out = [f"{page.name}:{block.line}" for page in DOCUMENTS for block in blocks(page) if block.not_run]
    assert len(left_out) <= MOST_NOT_RUN, left_out
    assert not [block for page in set(DOCUMENTS) - set(PAGES) for block in blocks(page) if block.language == "python"]


@pytest.mark.unit
@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_every_command_parses(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in blocks(page):
        for words in commands(block.body) if block.language == "bash" else []:
            where = f"{page.name}:{block.line}: {' '.join(words)}"
            if words[0].removeprefix(".venv/bin/") == "veneer":
                try:
                    _parse(words[1:])
                except (click.ClickException, veneer.VeneerError) as error:
                    if "Error" not in (block.printed or ""):  # a page may show a refusal
                        pytest.fail(f"{where}: {error}")
            if words[0] == "make":
                assert words[1] in targets, where
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for code in re.findall(r"`(?:\.venv/bin/)?veneer +([^`]+)`", text):
        verb, *words = code.split()
        if verb in ("VERB", "--help", "--version"):
            continue
        known = {option for parameter in _verb(verb).params for option in parameter.opts + parameter.secondary_opts}
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= known | {"--help"}, f"{page.name}: veneer {code}"
    for code in re.findall(r"`make ([^`]+)`", text):
        assert code.split()[0] in targets, f"{page.name}: make {code}"


def _parse(words: list[str]) -> None:
    """Read a command line as the command does, up to the values of its options."""
    if words[0] in ("--help", "-h", "--version"):
        return
    values = _verb(words[0]).make_context(words[0], words[1:]).params
    if words[0] == "train":
        yaml_file, resumed, options = values.pop("run_yaml"), values.pop("resume"), given(values)
        if resumed:
            assert set(options) <= set(RESUMABLE)
        TrainConfig(
            **({"model": "m", "data": "d", "output": "o"} if yaml_file or resumed or "adapter" in options else {})
            | options
        )


def _verb(name: str) -> click.Command:
    assert name in cli.commands, f"there is no verb {name}"
    return cli.commands[name]


@pytest.mark.unit
@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_every_yaml_block_is_a_run(page):
    for block in blocks(page):
        if block.language == "yaml":
            TrainConfig(**{"model": "m", "data": "d", "output": "o"} | yaml.safe_load(block.body))


@pytest.mark.unit
@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    _check_links(page, _FENCE.sub("", page.read_text(encoding="utf-8")))


def _check_links(page: Path, text: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path) if path else page
        assert to.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ +(.+)$", to.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_anchor(title) for title in titles}, f"{page.name}: {target}"


def _anchor(title: str) -> str:
    """The anchor that a forge gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.unit
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_committed_as_it_is_before_it_runs(notebook):
    """tests/recipe executes it."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    pytest.importorskip("nbformat", reason="pip install -e '.[dev]'").validate(content)
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }  # no version: it would change with each person who saves it
    for cell in content["cells"]:
        assert cell["metadata"] == {}, cell["id"]
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), f"clear the outputs of {cell['id']}"
    text = "\n\n".join("".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "markdown")
    _check_links(notebook, text)


@pytest.mark.unit
def test_every_measured_table_is_that_of_the_results():
    tables = _script("benchmarks/tables.py")
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    marked = [name for text in texts for name in re.findall("^<!-- measured: (.+) -->$", text, re.MULTILINE)]
    assert sorted(marked) == sorted(tables.BODIES)
    assert [table["name"] for text in texts for table in tables.TABLE.finditer(text)] == marked
    assert [tables.filled(text) for text in texts] == texts


@pytest.mark.unit
def test_the_learning_rates_are_those_of_the_results(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = _script("benchmarks/learning_rate.py")
    script.tell(script.read())
    page = (ROOT / "docs" / "studies" / "learning-rate.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in page
    script = _script("benchmarks/defaults.py")
    assert script.table(script.read()) in page


@pytest.mark.unit
def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [
        page.name for page in [*PAGES[1:], *NOTEBOOKS] if page.name != "index.md" and f"({page.name})" not in index
    ] == []


@pytest.mark.unit
def test_the_map_shows_every_file_of_the_package_and_no_other():
    tree = next(block for block in blocks(ROOT / "ARCHITECTURE.md") if block.body.startswith("src/veneer/"))
    shown, folders = [], {}
    for line in tree.body.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth] = name
        path = "".join(folders[level] for level in range(depth)) + name
        assert (ROOT / path).exists(), f"ARCHITECTURE.md shows {path}, which is not there"
        assert name.endswith("/") or len(line.split()) > 2, f"ARCHITECTURE.md says nothing about {path}"
        shown += [path] if not name.endswith("/") else []
    there = [str(p.relative_to(ROOT)) for p in (ROOT / "src" / "veneer").rglob("*.py") if p.stat().st_size]
    assert sorted(set(there) - set(shown)) == [], "ARCHITECTURE.md leaves these out"


@pytest.mark.unit
def test_imports_point_the_way_that_the_map_says():
    (line,) = re.findall(r"^cli.* → .*$", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.MULTILINE)
    level = {part: n for n, parts in enumerate(line.split(" → ")) for part in parts.split(", ")}
    package = ROOT / "src" / "veneer"
    back = [
        f"{file.relative_to(package)} imports veneer.{other}"
        for file in package.rglob("*.py")
        if (part := file.relative_to(package).parts[0].removesuffix(".py")) != "__init__"
        for other in re.findall(r"^ *from veneer\.(\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        if level[part] > level[other]
    ]
    assert back == []


def _script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks for its own types
    spec.loader.exec_module(module)
    return module


@pytest.mark.unit
def test_the_page_of_options_is_what_its_generator_makes_and_leaves_none_out():
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert text == _script("docs/options.py").page(), "run: make docs-options"
    of_runs, of_answers = (
        re.findall(r"^\| `([a-z_0-9]+)` \|", part, re.MULTILINE) for part in text.split("## An answer\n")
    )
    assert sorted(of_runs) == sorted({*TrainConfig.model_fields, *veneer.AdaLoRA.model_fields})
    assert of_answers == list(GenerateOptions.model_fields)


@pytest.mark.unit
def test_the_first_screen_has_the_measured_ratios():
    step, rows = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()) for name in ("step", "rows")
    )
    first, _, _ = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n![")
    ratios = (step["fp32"]["speed_ratio"], step["fp32"]["memory_ratio"], rows["runs"]["fp32"]["speed_ratio"])
    assert re.findall(r"\*\*(.+?) ×\*\*", first) == [f"{ratio:.2f}" for ratio in ratios]


@pytest.mark.unit
def test_every_page_is_in_the_site_and_its_links_lead_somewhere(tmp_path):
    pytest.importorskip("material", reason="the site needs mkdocs-material: pip install -e '.[docs]'")
    # A process of its own: mkdocs configures logging and warnings for all of Python.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "options" / "index.html").exists()
    assert [notebook.name for notebook in NOTEBOOKS if not (tmp_path / "site" / notebook.name).exists()] == []


@pytest.mark.unit
def test_every_public_name_verb_flag_and_shape_is_in_the_guide():
    text = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    guide = "\n".join(text.values())
    assert [name for name in veneer.__all__ if f"veneer.{name}" not in guide] == []
    for verb, command in cli.commands.items():
        assert re.search(rf"^## veneer {verb}$", text["cli.md"], re.MULTILINE), verb
        if verb != "train":  # whose flags are all in docs/options.md
            flags = [parameter.opts[0] for parameter in command.params if parameter.opts[0].startswith("--")]
            assert [flag for flag in flags if f"`{flag}`" not in text["cli.md"]] == [], verb
    for shape in SHAPES:
        assert f"| {shape} |" in text["data.md"], shape
        assert f"| {shape} |" in text["README.md"], shape
    assert [name for name in RESUMABLE if f"`{name}`" not in text["training.md"]] == []
