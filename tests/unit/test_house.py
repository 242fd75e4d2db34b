"""The house keeps its seams: no circle of imports, no two public functions of one name, no function over a page."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import veneer

pytestmark = pytest.mark.unit

SOURCE = Path(veneer.__file__).parent
FILES = {
    "veneer." + ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}
LONGEST = 60  # lines of a function
# One word that means the same in two rooms: the verb and what it does; the entry of each program; a definition and its
# backend.
SHARED = {"main"}


def _trees():
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def _imports(tree):
    """The modules that a file imports, wherever in it, but for types alone."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types and (node.module or "").startswith("veneer"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                native = (SOURCE.parent / full.replace(".", "/")).with_suffix(".pyi").is_file()
                if not native:
                    yield full if full in FILES else node.module


def _circle(graph):
    """The first circle found, as a path; empty where there is none."""
    state = dict.fromkeys(graph, 0)  # 1: on the way, 2: done

    def visit(name, path):
        state[name] = 1
        for other in graph[name]:
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if state.get(other) == 0 and (found := visit(other, [*path, other])):
                return found
        state[name] = 2
        return []

    for name in graph:
        if state[name] == 0 and (found := visit(name, [name])):
            return found
    return []


def test_no_file_imports_itself_by_way_of_others():
    assert _circle({name: set(_imports(tree)) - {name} for name, tree in _trees().items()}) == []


def test_a_circle_would_be_found():
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def _public(tree):
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


def test_a_public_function_has_a_name_of_its_own():
    """A verb of the command line (cli.py, commands/) is called as what it does."""
    homes = {}
    for name, tree in _trees().items():
        if name != "veneer.cli" and ".commands." not in name:
            for function in _public(tree):
                homes.setdefault(function, []).append(name)
    assert {function: names for function, names in homes.items() if len(names) > 1 and function not in SHARED} == {}


def _lines(function):
    """Of a function, without its docstring, which holds its errors and an example."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_a_function_fits_on_a_page():
    functions = {
        f"{name}.{node.name}": _lines(node)
        for name, tree in _trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in functions.items() if lines > LONGEST} == {}
