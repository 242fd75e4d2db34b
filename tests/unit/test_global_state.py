"""What is still global is listed in ARCHITECTURE.md, each piece with its reach, and nothing else is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "veneer"
_CONTAINERS = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
_MUTATING = {"add", "append", "clear", "discard", "extend", "insert", "pop", "remove", "setdefault", "update"}
_IMMUTABLE = {"frozenset", "tuple", "str", "int", "float", "bytes", "min", "max", "sum", "len", "sorted", "hasattr",
              "compile", "TypeVar", "field", "option", "getLogger", "register", "Path"}  # fmt: skip
# Calls that change what the whole process does, by their last two names, or by the last one.
_SETTERS = {
    "torch.manual_seed", "torch.set_rng_state", "cuda.set_rng_state", "random.setstate", "random.set_state",
    "random.seed", "torch.set_num_threads", "environ.setdefault", "environ.update", "environ.pop", "os.putenv",
    "AttentionInterface.register", "AttentionMaskInterface.register", "register_optimizer_step_pre_hook",
    "register_optimizer_step_post_hook", "signal.signal", "warnings.filterwarnings", "warnings.simplefilter",
    "matplotlib.use", "logging.set_verbosity", "logging.set_verbosity_error", "logging.disable_progress_bar",
    "redirect_stderr", "redirect_stdout", "_cpu.use_heap", "graph.saved_tensors_hooks", "random.fork_rng",
}  # fmt: skip


def _names(target: ast.expr) -> Iterator[str]:
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, ast.Tuple | ast.List):
        for each in target.elts:
            yield from _names(each)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _changed(tree: ast.Module) -> set[str]:
    """Names of which something is set, deleted or called that changes what they hold, anywhere in the module."""
    changed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            changed.add(_dotted(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATING:
            changed.add(_dotted(node.func.value))
    return changed


def _is_state(name: str, value: ast.expr | None, changed: set[str]) -> bool:
    """A container or an object; one written like a constant is none where its module never changes it."""
    if isinstance(value, ast.Call):
        mutable = _dotted(value.func).rpartition(".")[2] not in _IMMUTABLE
    else:
        mutable = isinstance(value, _CONTAINERS)
    return mutable and (name in changed or not name.strip("_").isupper()) and name != "__all__"


def global_state(code: str) -> set[str]:
    """The process-wide state that a module keeps, or sets in others, by name."""
    tree = ast.parse(code)
    changed = _changed(tree)
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name for target in targets for name in _names(target) if _is_state(name, node.value, changed)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            names |= set(node.names)
        elif isinstance(node, ast.FunctionDef):
            decorators = {_dotted(each.func if isinstance(each, ast.Call) else each) for each in node.decorator_list}
            if {each.rpartition(".")[2] for each in decorators} & {"cache", "lru_cache"}:
                names.add(node.name)
        elif isinstance(node, ast.Call):
            name = ".".join(_dotted(node.func).split(".")[-2:])
            if name in _SETTERS:
                names.add(name)
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = _dotted(node.value) if isinstance(node, ast.Subscript) else _dotted(node)
            names |= {name} & {"os.environ", "logger.disabled"}
    return names


def listed() -> dict[str, set[str]]:
    """File → names, of the section's table."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.partition("## What is still global")[2].partition("\n## ")[0]
    table: dict[str, set[str]] = {}
    for file, names in re.findall(r"^\| `([\w/]+\.py)` \| ([^|]*) \|", section, re.MULTILINE):
        assert file not in table, f"{file} is listed twice"
        table[file] = set(re.findall(r"`([^`]+)`", names))
    return table


def test_what_is_global_is_listed_with_its_reach():
    state = {str(file.relative_to(PACKAGE)): global_state(file.read_text(encoding="utf-8"))
             for file in sorted(PACKAGE.rglob("*.py"))}  # fmt: skip
    assert listed() == {file: names for file, names in state.items() if names}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("_flag = False\ndef f():\n    global _flag\n    _flag = True", {"_flag"}),
        ("_recipes = {}", {"_recipes"}),
        ("_recipes: dict[int, int] = {}", {"_recipes"}),
        ("TABLE = {1: 2}", set()),
        ("TABLE = {1: 2}\ndef f():\n    TABLE[3] = 4", {"TABLE"}),
        ("SEEN = []\ndef f():\n    SEEN.append(1)", {"SEEN"}),
        ("_room = threading.local()", {"_room"}),
        ("@cache\ndef f(): ...", {"f"}),
        ("@functools.lru_cache(maxsize=1)\ndef f(): ...", {"f"}),
        ("_NAMES = re.compile('a')\nlimit = 3", set()),
        ("def f():\n    torch.manual_seed(0)\n    os.environ['A'] = '1'", {"torch.manual_seed", "os.environ"}),
        ("def f():\n    recipes = {}\n    recipes[1] = 2", set()),
        ("AttentionInterface.register('a', f)", {"AttentionInterface.register"}),
    ],
)
def test_each_kind_of_it_is_seen(code, names):
    assert global_state(code) == names
