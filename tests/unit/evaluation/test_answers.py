"""Base and adapter side by side."""

from __future__ import annotations

import pytest

from veneer.data.formats import Example
from veneer.data.labels import Renderer
from veneer.evaluation.answers import answered, spread
from veneer.runs.opened import open_named

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("count", "places"), [(0, []), (1, [0]), (3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))]
)
def test_rows_at_equal_distances(count, places):
    rows = [Example(str(place), prompt="a", answer="b") for place in range(10)]
    assert [int(row.where) for row in spread(rows, count)] == places


def test_conversations_are_shown_as_such_and_plain_text_asks_nothing(finished_run):
    opened = open_named(finished_run)
    renderer: Renderer = opened.renderer
    rows = [Example("a", prompt=" bat: ", answer=" yes"), Example("b", answer="only a text")]
    (one,) = answered(opened.model, renderer, rows, 2)
    assert (one.where, one.prompt, one.expected, one.chosen) == ("a", "bat:", "yes", False)
    assert one.base != one.adapter
