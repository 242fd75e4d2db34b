"""No error of ours is swallowed: the few places that catch everything try one call of a library, and are listed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import veneer

pytestmark = pytest.mark.unit

SOURCE = Path(veneer.__file__).parent
# File and function → why nothing narrower will do, and all that is tried: one call, of a library.
ALLOWED = {
    "models/library.py call_library": (
        "transformers and gguf read a person's files by code of each kind of model, which raises anything",
        "return call(*arguments, **options)",
    ),
    "data/hub.py _loaded": (
        "datasets reads a person's files with pyarrow, pandas and a library for each compression, and asks the hub",
        "return load()",
    ),
    "data/hub.py _configs": (
        "datasets lists configurations as it loads; where it cannot, loading says what is wrong",
        "names = datasets.get_dataset_config_names(where)",
    ),
    "data/template.py _rendered": (
        "a chat template is a program that comes with a model",
        "made = self._bound.run(lambda: self.tokenizer.apply_chat_template(messages, tokenize=False, "
        "add_generation_prompt=ask, **how))",
    ),
    "data/metrics.py _of_row": (
        "a metric is a function of the person's own",
        "value = function(prediction, row_of(row))",
    ),
    "data/metrics.py _imported": (
        "a module of the person's own is run when it is imported",
        "loaded = importlib.import_module(module)",
    ),
    "documents.py parsed_yaml": (
        "PyYAML makes dates, numbers and tags by code that raises what it happens to",
        "return yaml.safe_load(text)",
    ),
}
# Whatever is raised in a thread is raised again by the one that waits for it.
CARRIED = "planning/empty.py run"


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    everything = any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)
    last = handler.body[-1]
    return everything and not (isinstance(last, ast.Raise) and last.exc is None)


def _tried(node: ast.AST, function: str = ""):
    """(function, what is tried) for each ``try`` in it that catches everything and does not raise the same again."""
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(child, ast.Try) and any(map(_catches_everything, child.handlers)):
            yield inside, "\n".join(map(ast.unparse, child.body))
        yield from _tried(child, inside)


def test_what_catches_everything_is_listed_and_holds_one_call_of_a_library():
    places = {
        f"{path.relative_to(SOURCE).as_posix()} {function}": tried
        for path in sorted(SOURCE.rglob("*.py"))
        for function, tried in _tried(ast.parse(path.read_text(encoding="utf-8")))
    }
    places.pop(CARRIED, None)
    assert places == {place: tried for place, (_, tried) in ALLOWED.items()}
