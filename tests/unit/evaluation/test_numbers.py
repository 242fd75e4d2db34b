"""Numbers against the right ones, and labels of which a row may have several: by scipy and scikit-learn where they are
installed, and by hand."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.evaluation.classes import Classes
from veneer.evaluation.numbers import NumberScores

pytestmark = pytest.mark.unit


def test_by_hand():
    found = NumberScores.of([1, 2, 3, 4], [2, 2, 4, 3])
    assert (found.mse, found.mae) == (0.75, 0.75)
    assert found.r2 == pytest.approx(1 - 3 / 5)
    assert found.pearson == pytest.approx(numpy.corrcoef([1, 2, 3, 4], [2, 2, 4, 3])[0, 1])
    assert found.spearman == pytest.approx(numpy.corrcoef([1, 2, 3, 4], [1.5, 1.5, 4, 3])[0, 1])


def test_what_is_not_defined_is_none():
    found = NumberScores.of([1.0, 1.0], [1.0, 2.0])
    assert (found.r2, found.pearson, found.spearman) == (None, None, None)
    assert NumberScores.of([1.0, 2.0], [3.0, 3.0]).pearson is None


_FEW = st.integers(-5, 5).map(float)


@given(st.lists(st.tuples(_FEW, _FEW), min_size=3, max_size=30))
def test_as_scipy_and_scikit_learn(pairs):
    stats, metrics = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    right, guessed = zip(*pairs, strict=True)
    found = NumberScores.of(right, guessed)
    assert found.mse == pytest.approx(metrics.mean_squared_error(right, guessed))
    assert found.mae == pytest.approx(metrics.mean_absolute_error(right, guessed))
    if len({*right}) > 1:
        assert found.r2 == pytest.approx(metrics.r2_score(right, guessed))
    if len({*right}) > 1 and len({*guessed}) > 1:
        assert found.pearson == pytest.approx(stats.pearsonr(right, guessed).statistic, abs=1e-9)
        assert found.spearman == pytest.approx(stats.spearmanr(right, guessed).statistic, abs=1e-9)


_SETS = st.lists(st.tuples(st.sets(st.sampled_from("abc")), st.sets(st.sampled_from("abc"))), min_size=1, max_size=20)


@given(_SETS)
def test_labels_as_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    right, chosen = zip(*pairs, strict=True)
    found = Classes.of_several(right, chosen, ["a", "b", "c"])
    hot = [[[int(name in names) for name in "abc"] for names in side] for side in (right, chosen)]
    precision, recall, f1, rows = metrics.precision_recall_fscore_support(*hot, zero_division=0)
    assert [score.precision for score in found.scores] == pytest.approx(list(precision))
    assert [score.recall for score in found.scores] == pytest.approx(list(recall))
    assert [score.f1 for score in found.scores] == pytest.approx(list(f1))
    assert [score.rows for score in found.scores] == list(rows)
    assert found.micro_f1 == pytest.approx(metrics.f1_score(*hot, average="micro", zero_division=0))
    assert (found.confusion, found.largest) == ([], None)


def test_labels_by_hand():
    found = Classes.of_several([("a",), ("a", "b"), ()], [("a",), ("b",), ("b",)], ["a", "b", "c"])
    assert [(score.precision, score.recall, score.rows, score.chosen) for score in found.scores] == [
        (1.0, 0.5, 2, 1), (0.5, 1.0, 1, 2), (0.0, 0.0, 0, 0)
    ]  # fmt: skip
    assert found.micro_f1 == pytest.approx(4 / 6)
    assert found.macro_f1 == pytest.approx(2 / 3)  # the mean of a and b, of which there are rows
