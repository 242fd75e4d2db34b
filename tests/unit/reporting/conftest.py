"""Folders of runs that were never trained: a report reads files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer.training.config import TrainConfig
from veneer.training.metrics import METRICS_NAME


@pytest.fixture
def run_folder(tmp_path):
    """A function that makes one: ``steps`` of them measured, each tenth evaluated, other files as given."""

    def make(
        steps: int = 12, *, total: int = 20, name: str = "run", files: dict[str, Any] | None = None, **options
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        given = {"model": "some/base", "data": "rows.jsonl", "output": str(folder), "steps": total} | options
        TrainConfig(**given).write(folder)
        if steps:
            (folder / METRICS_NAME).write_text("".join(json.dumps(record) + "\n" for record in records(steps)))
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
