"""Rows with preferences, measured: the loss of the good answers, and whether the chosen one is the likelier."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import veneer
from veneer.commands.config import InspectOptions
from veneer.commands.inspect import inspect_source
from veneer.data.formats import to_examples
from veneer.data.labels import IGNORE, Renderer
from veneer.data.memory import rows_of
from veneer.errors import DataError
from veneer.evaluation.compare import compare, preferred
from veneer.training.loss import Loss

pytestmark = pytest.mark.unit

PAIRS = [
    {"prompt": f"{word}:", "chosen": chosen, "rejected": rejected}
    for word, chosen, rejected in (("cat", " a", " zebra"), ("owl", " a longer one", " b"), ("x", " q", " r"))
]  # fmt: skip
JUDGED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": row["prompt"] != "x:"} for row in PAIRS]


@pytest.fixture
def opened(tiny_folder):
    model, tokenizer = veneer.load(str(tiny_folder))
    return model, Renderer(tokenizer)


def log_probability(model, row):
    logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
    labels = torch.tensor(row.labels[1:])
    return -float(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").detach())


def test_the_share_of_pairs_whose_chosen_answer_is_likelier(opened):
    model, renderer = opened
    examples = to_examples(rows_of(PAIRS)).items
    sides = [[log_probability(model, renderer.one(one)) for one in (row, row.rejected)] for row in examples]
    wanted = sum(chosen > rejected for chosen, rejected in sides) / 3
    assert 0 < wanted < 1
    loss = Loss(model, 0, renderer.one(examples[0]), kind="causal")
    assert preferred(model, loss, renderer, examples, 2) == pytest.approx(wanted)
    comparison = compare(model, renderer, examples)
    assert (comparison.base.preferred, comparison.adapter.exact_match) == (pytest.approx(wanted), None)
    assert "labels" not in comparison.note  # that the answers are none goes without saying
    asked = compare(model, renderer, examples, exact_match=True)
    assert asked.adapter.exact_match is None
    assert asked.note.startswith("Exact match was not measured: in rows with preferences")
    assert any(line[0] == "chosen likelier than rejected" for line in comparison._lines())
    tokens = sum(renderer.one(row).learned for row in examples)
    assert comparison.base.loss == pytest.approx(-sum(chosen for chosen, _ in sides) / tokens, rel=1e-5)


def test_the_loss_is_that_of_good_answers(opened):
    model, renderer = opened
    good, all_bad = (to_examples(rows_of(rows)).items for rows in (JUDGED, [{**JUDGED[0], "label": False}]))
    comparison = compare(model, renderer, good)
    assert comparison.base.preferred is None
    assert comparison.base.loss == compare(model, renderer, good[:2]).base.loss
    with pytest.raises(DataError, match="All 1 rows are labelled false; there is no good answer to learn"):
        compare(model, renderer, all_bad)


def test_inspect_shows_each_answer_and_what_it_is(tiny_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    for rows, places in (
        (PAIRS, ["1, chosen", "1, rejected", "2, chosen"]),
        ([JUDGED[0], JUDGED[2]], ["1, good", "2, bad"]),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        shown = inspect_source(str(file), InspectOptions(model=str(tiny_folder), rows=3)).values["examples"]
        assert [one["where"].removeprefix(f"{file}:") for one in shown] == places
