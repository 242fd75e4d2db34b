"""Layers whose weight the module around them multiplies by itself, such as Mamba's ``dt_proj``.

The layer is never called, so that its weight can neither be kept in codes nor have an update. Which they are is found
in the source of transformers' classes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import nn

_READS = re.compile(r"self\.[\w.]+\.weight\b")
_ABOUT = ("dtype", "device")  # what is asked of a weight, without reading its values
_BEFORE = ("__init__", "_init_weights", "init_mamba_weights", "tie_weights")  # when no weight is loaded yet
# DeBERTa reads in_proj's weight only with queries of their own, a path that cannot run: it transposes three dimensions.
_CALLED = "query_states is None"
# What is never reached here: kernels of other packages for training on a GPU, and tensor-parallel pretraining.
_KERNELS, _GUARDS = ("mamba_inner_fn",), ("pretraining_tp",)


def read_outside(model: nn.Module) -> set[str]:
    """The names of the modules whose weight another module of the model reads in its forward pass."""
    return {
        f"{name}.{path}".lstrip(".")
        for name, module in model.named_modules()
        for path in _read_by(cast(Hashable, type(module)))
        if _has(module, path)
    }


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        inside = module._modules.get(part)
        if inside is None:
            return False
        module = inside
    return True


@cache
def _read_by(kind: Any) -> frozenset[str]:
    """Paths, from a module of this class, of the modules whose weight it reads."""
    known = [cls for cls in kind.__mro__ if cls.__module__.startswith("transformers.models.")]
    return frozenset(path for cls in known for path in _reads_in(cls.__module__).get(cls.__name__, ()))


@cache
def _reads_in(module: str) -> dict[str, set[str]]:
    """The same of each class of a Python module that reads any."""
    file = getattr(sys.modules[module], "__file__", None)
    source = Path(file).read_text(encoding="utf-8") if file and file.endswith(".py") else ""
    if not _READS.search(source):
        return {}
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return {node.name: paths for node in classes if (paths := set(_reads(node, None)))}


def _reads(node: ast.AST, parent: ast.AST | None) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef) and node.name in _BEFORE:
        return
    if isinstance(node, ast.If) and any(guard in ast.unparse(node.test) for guard in _GUARDS):
        for other in node.orelse:
            yield from _reads(other, node)
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == _CALLED:
        for taken in node.body:
            yield from _reads(taken, node)
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (*_KERNELS, "isinstance"):
        return
    if isinstance(node, ast.Attribute) and node.attr == "weight":
        owner = ast.unparse(node.value)
        about = isinstance(parent, ast.Attribute) and parent.attr in _ABOUT
        if owner.startswith("self.") and not about:
            yield owner.removeprefix("self.")
    for child in ast.iter_child_nodes(node):
        yield from _reads(child, node)
