"""Precision, recall, F1 and the confusion matrix, against their definitions, pair by pair."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.evaluation.classes import Classes

pytestmark = pytest.mark.unit
LABELS = ["a", "b", "c"]
RIGHT = "0012003100101000110001103100221011100013"
CHOSEN = "0010003103101100130003103101031111101001"
# scikit-learn 1.9.1: precision_recall_fscore_support(RIGHT, CHOSEN, zero_division=0), the same with average="macro",
# and confusion_matrix, of these two as lists.
BY_LABEL = [
    (0.8333333333333334, 0.75, 0.7894736842105263, 20),
    (0.6875, 0.7857142857142857, 0.7333333333333333, 14),
    (0.0, 0.0, 0.0, 3),
    (0.3333333333333333, 0.6666666666666666, 0.4444444444444444, 3),
]
MACRO_F1 = 0.491812865497076
CONFUSION = [[15, 4, 0, 1], [1, 11, 0, 2], [2, 0, 0, 1], [0, 1, 0, 2]]


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=40))
def test_they_are_as_they_are_defined(pairs):
    classes = Classes.of(*zip(*pairs, strict=True), LABELS)
    for score in classes.scores:
        both = sum(right == chosen == score.label for right, chosen in pairs)
        have = [right for right, _ in pairs if right == score.label]
        got = [chosen for _, chosen in pairs if chosen == score.label]
        assert (score.rows, score.chosen) == (len(have), len(got))
        assert score.precision == (both / len(got) if got else 0.0)
        assert score.recall == (both / len(have) if have else 0.0)
        mean = 2 / (1 / score.precision + 1 / score.recall) if both else 0.0
        assert score.f1 == pytest.approx(mean)
    assert classes.confusion == [[pairs.count((right, chosen)) for chosen in LABELS] for right in LABELS]
    used = [score.f1 for score in classes.scores if any(score.label in pair for pair in pairs)]
    assert classes.macro_f1 == pytest.approx(sum(used) / len(used))
    assert classes.largest == max(sum(right == label for right, _ in pairs) for label in LABELS) / len(pairs)


def test_a_label_that_was_never_chosen_has_a_mark_and_one_that_was_not_asked_for_a_row():
    classes = Classes.of(["a", "b", "d"], ["a", "a", "a"], ["a", "b"])
    assert [score.label for score in classes.scores] == ["a", "b", "d"]
    assert [line[1] for line in classes.lines()] == ["33.3 %", "0.0 % (never chosen)", "0.0 % (never chosen)"]
    assert classes.confusion_lines() == [["a", "1", "0", "0"], ["b", "1", "0", "0"], ["d", "1", "0", "0"]]


def test_the_scores_are_those_of_scikit_learn():
    classes = Classes.of(RIGHT, CHOSEN, "0123")
    assert [(one.precision, one.recall, one.f1, one.rows) for one in classes.scores] == [
        (*map(pytest.approx, row[:3]), row[3]) for row in BY_LABEL
    ]
    assert classes.confusion == CONFUSION
    assert (classes.macro_f1, classes.largest) == (pytest.approx(MACRO_F1), 0.5)


def test_what_was_chosen_besides_the_labels_has_a_row_and_column_too():
    classes = Classes.of(["a", "b"], ["a", "x"], ["a", "b"])
    assert [(score.label, score.rows, score.chosen) for score in classes.scores] == [
        ("a", 1, 1),
        ("b", 1, 0),
        ("x", 0, 1),
    ]
    assert classes.macro_f1 == pytest.approx(1 / 3)
