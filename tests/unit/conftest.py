"""What unit tests share: the command line in this process, run folders without a training, a model without a plan."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers as tf

from veneer.cli import main
from veneer.runs.folder import RunFolder
from veneer.training.config import TrainConfig


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def veneer_command(monkeypatch, capsys):
    """A function from arguments to the outcome; any exception but the exit itself fails the test as a traceback."""

    def run(*arguments, stdin="", terminal=False) -> Outcome:
        given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        given.isatty = lambda: terminal
        monkeypatch.setattr(sys, "argv", ["veneer", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", given)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(veneer_command):
    """A function from arguments to the one sentence of a refusal, which it checks for its form."""

    def run(*arguments, code=1, stdin="") -> str:
        outcome = veneer_command(*arguments, stdin=stdin)
        assert (outcome.code, outcome.out) == (code, ""), outcome
        assert "Traceback" not in outcome.err
        # A refused command line may be told with its usage before; all else is "Error: " and the message.
        before, error, message = outcome.err.partition("Error: ")
        assert error
        assert not before or code == 2
        return message.strip()

    return run


@pytest.fixture
def run_folder(tmp_path):
    """A function that makes one: ``steps`` of them measured, each tenth evaluated, other files as given."""

    def make(
        steps: int = 12, *, total: int = 20, name: str = "run", files: dict[str, Any] | None = None, **options
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        given = {"model": "some/base", "data": "rows.jsonl", "output": str(folder), "steps": total} | options
        TrainConfig(**given).write(RunFolder(folder).config_file)
        if steps:
            (RunFolder(folder).metrics_file).write_text("".join(json.dumps(record) + "\n" for record in records(steps)))
        for file, value in {"rows.json": {"steps": total, "train": 90, "held_out": 10}, **(files or {})}.items():
            (folder / file).write_text(json.dumps(value))
        return folder

    return make


def records(steps: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"step": 0, "held_out_loss": 3.25, "held_out_perplexity": 25.8}]
    for step in range(1, steps + 1):
        found.append(
            {
                "step": step, "loss": 3 / step + 0.125, "learning_rate": 1e-3 * (1 - step / 1000), "gradient_norm": 1.5,
                "tokens": 100 * step, "tokens_per_second": 200.0 if step % 2 else 100.0,
                "peak_memory": 1_500_000_000 + step,
            }
        )  # fmt: skip
        if step % 10 == 0:
            found.append({"step": step, "held_out_loss": 3 / step + 0.25, "held_out_perplexity": 1.7})
    return found


@pytest.fixture
def looking_at_values(tmp_path) -> str:
    """A folder without weights, of a model whose passes ask a tensor for its values: it cannot be planned."""
    folder = tmp_path / "modernbert"
    config = tf.ModernBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        architectures=["ModernBertForSequenceClassification"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return str(folder)
