"""What is drawn, as values."""

from __future__ import annotations

from itertools import pairwise

import pytest

from veneer.reporting.charts import Chart, Series, displayed, run_charts, smoothed
from veneer.runs.history import RunHistory

pytestmark = pytest.mark.unit


def test_a_long_table_keeps_points_at_equal_distances_and_the_last():
    chart = Chart("loss", "Loss", "step", "nats", (Series("training", [(x, x / 7) for x in range(1, 1002)]),))
    steps = [int(row[0].replace(",", "")) for row in chart.table()]
    assert len(steps) <= 200
    assert steps[-1] == 1001
    assert len({after - before for before, after in pairwise(steps)}) == 1
    assert chart.table()[-1] == ["1,001", "143"]


def test_a_long_table_keeps_every_point_of_a_short_curve():
    """As of the held-out losses beside those of the steps: a reader of the table must not miss them."""
    held_out = Series("held-out rows", [(x, x / 7) for x in range(0, 2001, 50)])
    chart = Chart("loss", "Loss", "step", "nats", (Series("training", [(x, 1.0) for x in range(1, 2001)]), held_out))
    rows = chart.table()
    assert [row[0] for row in rows if row[2]] == [displayed(x) for x, _ in held_out.points]
    assert len(rows) < 200 + len(held_out.points)
    assert [row[0] for row in rows] == [displayed(x) for x in sorted(int(row[0].replace(",", "")) for row in rows)]


def test_the_sentence_says_where_a_curve_begins_ends_and_turns():
    chart = Chart("loss", "Loss", "step", "nats", (Series("training", [(1, 3.0), (2, 0.5), (3, 1.25)]),))
    assert chart.sentence() == "Loss, nats by step. training: 3 at 1 to 1.25 at 3, lowest 0.5 at 2, highest 3 at 1."


def test_a_running_mean_of_what_there_is_so_far():
    assert smoothed([(1, 4.0), (2, 2.0), (3, 0.0), (4, 10.0)], 2) == [(1, 4.0), (2, 3.0), (3, 1.0), (4, 5.0)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (1234567, "1,234,567"), (0.000123456, "0.00012346"), (2.0, "2"), (True, "True"), ("a", "a"), (None, "")],
)
def test_a_number_as_it_is_shown(value, text):
    assert displayed(value) == text


def test_losses_far_apart_have_a_logarithmic_axis(run_folder):
    few = run_charts(RunHistory.read(run_folder(3, name="few")))[0]
    many = run_charts(RunHistory.read(run_folder(60, name="many")))[0]
    assert (few.log, many.log) == (False, False)
    assert [one.name for one in few.series] == ["training", "held-out rows"]
    assert [one.name for one in many.series] == ["training", "training, mean of 5 steps", "held-out rows"]
    run = RunHistory.read(run_folder(3, name="apart"))
    run.held_out[0]["held_out_loss"] = 70.0
    assert run_charts(run)[0].log
