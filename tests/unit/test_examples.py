"""Every public docstring has an example, and each runs and prints what it shows.

What an example finds: ``veneer``, ``torch`` and ``os``; ``model`` and ``tokenizer``, a tiny one without adapters; its
``folder``; ``quiet``, a console that prints nowhere; and, where it runs, the model as tiny/, rows.jsonl, and a LoRA
that was trained a little as adapter/. ``...`` stands for any text.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

import veneer
from veneer.planning.ledger import KINDS
from veneer.planning.machine import Machine

REAL_MODEL = "smollm2-135m-instruct"
# What public functions give, whose methods a user calls.
GIVEN = ["updates.allocator.Allocator", "updates.trainable.Trainable"]


def _documented() -> dict[str, object]:
    """Name → public function, class, or public method of what they give."""
    objects: dict[str, object] = {name: getattr(veneer, name) for name in veneer.__all__}
    for path in GIVEN:
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(f"veneer.{module}"), name)
        objects[name] = kind
        objects |= {f"{name}.{method}": value for method, value in vars(kind).items() if inspect.isfunction(value)}
    return objects


def _examples() -> dict[str, list[doctest.Example]]:
    parse = doctest.DocTestParser().get_examples
    texts = {name: inspect.cleandoc(value.__doc__ or "") for name, value in _documented().items()}
    return {name: examples for name, text in texts.items() if (examples := parse(text, name))}


EXAMPLES = _examples()


def _cases() -> list[object]:
    real = {name: any(REAL_MODEL in example.source for example in examples) for name, examples in EXAMPLES.items()}
    return [pytest.param(n, id=n, marks=pytest.mark.recipe if real[n] else pytest.mark.unit) for n in EXAMPLES]


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory) -> Path:
    model, _ = veneer.load(tiny_folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        veneer.attach(model, veneer.LoRA(rank=4))
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    veneer.save(model, folder)
    return folder


@pytest.fixture
def place(request, tmp_path, monkeypatch, tiny_folder, adapter) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copytree(tiny_folder, "tiny")
    shutil.copytree(adapter, "adapter")
    rows = [{"prompt": f"{a}{b}:", "completion": " yes" if a < "g" else " no"} for a in "bcdfgklm" for b in "aeiou"]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if request.node.get_closest_marker("recipe"):
        real = request.getfixturevalue("smollm2_folder")
        monkeypatch.setattr("veneer.models.source.packaged_path", lambda name: real)
    rates = {kind: 1e11 if kind in ("products", "attention") else 1e10 for kind in KINDS}
    monkeypatch.setattr("veneer.commands.plan.measured", lambda **_: Machine(rates, 1e-6, 4 * 10**8, 4 * 10**8))
    return tmp_path


@pytest.mark.parametrize("name", _cases())
def test_the_example_runs_and_prints_what_it_shows(name, place):
    model, tokenizer = veneer.load("tiny")
    known = {"veneer": veneer, "torch": torch, "os": os, "model": model, "tokenizer": tokenizer}
    known |= {"folder": "tiny", "quiet": Console(file=io.StringIO())}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    said = io.StringIO()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        test = doctest.DocTest(EXAMPLES[name], known, name, None, None, None)
        failed, _ = doctest.DocTestRunner(optionflags=flags).run(test, out=said.write)
    assert not failed, said.getvalue()


@pytest.mark.unit
def test_every_public_name_has_an_example():
    assert set(veneer.__all__) <= set(EXAMPLES)
    assert {"Trainable", "Allocator.ranks", "Allocator.importance", "Allocator.state_dict"} <= set(EXAMPLES)
