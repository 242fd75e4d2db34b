"""Base and adapter on the same rows: each figure is the one that a plain computation gives."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

import veneer
from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.evaluation.compare import Comparison, Scores, compare, measure
from veneer.generation.likelihood import likeliest
from veneer.runs.opened import open_run
from veneer.training.loss import Loss

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def prepared(finished_run):
    return open_run(finished_run)


def _printed(comparison):
    console = Console(file=io.StringIO(), width=100)
    console.print(comparison.table())
    return console.file.getvalue()


def test_the_base_is_the_base_and_the_adapter_the_adapter(prepared):
    model, renderer, rows = prepared.model, prepared.renderer, prepared.held_out
    comparison = compare(model, renderer, rows)
    base, _ = veneer.load(prepared.config.model)
    tokens, _ = renderer.all(rows)
    for scores, other in ((comparison.base, base), (comparison.adapter, model)):
        loss = Loss(other, renderer.pad, tokens[0], kind="causal").mean(tokens, 4)
        assert scores.loss == pytest.approx(loss, rel=1e-5)
        assert scores.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        chosen = likeliest(other, renderer, rows, [" no", " yes"], 16)
        right = [answer == row.answer for answer, row in zip(chosen, rows, strict=True)]
        assert scores.choice_accuracy == sum(right) / len(rows)
        assert scores.exact_match is None
    assert (comparison.rows, comparison.choices) == (16, [" no", " yes"])
    assert comparison.adapter.choice_accuracy > 0.8 > comparison.base.choice_accuracy
    assert comparison.adapter.loss < comparison.base.loss


def test_exact_match_is_measured_where_it_is_asked_for(prepared, monkeypatch):
    model, renderer = prepared.model, prepared.renderer
    asked = compare(model, renderer, prepared.held_out, exact_match=True)
    assert asked.base.exact_match == 0, "a base that was never trained says nothing of the kind"
    assert asked.adapter.exact_match == asked.adapter.choice_accuracy
    assert compare(model, renderer, prepared.held_out[:3], exact_match=True).adapter.exact_match is not None
    monkeypatch.setattr("veneer.evaluation.compare.exact_matches", None)  # nobody asked for what takes minutes
    many = compare(model, renderer, prepared.held_out[:3])
    assert (many.choices, many.adapter.choice_accuracy, many.adapter.exact_match) == ([], None, None)
    assert many.note == (
        "The answers are not a few labels, and whether they are given word for word was not measured: --exact-match "
        "generates one for every row, by base and adapter."
    )
    text = compare(model, renderer, [Example("d", answer="a plain text")])
    assert (text.adapter.choice_accuracy, text.adapter.exact_match, text.note) == (None, None, "")


def test_a_classifier(finished_classifier):
    prepared = open_run(finished_classifier)
    comparison = compare(prepared.model, prepared.renderer, prepared.held_out, exact_match=True)
    assert comparison.choices == ["no", "yes"]
    assert comparison.adapter.choice_accuracy > 0.8 > comparison.base.choice_accuracy
    assert comparison.adapter.exact_match is None


def test_a_loss_too_large_for_a_perplexity(tiny_folder):
    model, made = veneer.load(tiny_folder)
    model.lm_head.weight.data.mul_(1e6)
    scores = measure(model, Renderer(made), [Example("d", prompt="q", answer="answer")], [], False, 1)
    assert scores.loss > 700
    assert scores.perplexity == math.exp(700), "a number that JSON can hold"


def test_the_table_and_the_json():
    comparison = Comparison(
        20, ["a", "b"], Scores(7.0, math.exp(7), 0.5, None), Scores(0.25, math.exp(0.25), 0.9, None)
    )
    lines = [line.split() for line in _printed(comparison).splitlines()]
    assert lines[0] == ["20", "held-out", "rows"]
    assert ["│", "loss", "│", "7.000", "│", "0.250", "│"] in lines
    assert ["│", "perplexity", "│", "1,096.63", "│", "1.28", "│"] in lines
    assert "choice accuracy (2 labels) │   50.0 % │  90.0 %" in _printed(comparison)
    assert "exact match" not in _printed(comparison)
    assert repr(comparison) == (
        "Comparison(20 held-out rows, base → adapter: loss 7.000 → 0.250, perplexity 1,096.63 → 1.28, "
        "choice accuracy (2 labels) 50.0 % → 90.0 %)"
    )
    html = replace(comparison, trained="<b>mine")._repr_html_()
    assert html.startswith("<table><caption>20 held-out rows</caption>")
    assert "&lt;b&gt;mine" in html
    assert "<b>" not in html
    assert html.count("<tr>") == 4
    assert ">50.0 %<" in html
    assert json.loads(json.dumps(comparison.as_json()))["adapter"]["choice_accuracy"] == 0.9
