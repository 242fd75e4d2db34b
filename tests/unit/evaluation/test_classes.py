"""Precision, recall, F1 and the confusion matrix, against their definitions, pair by pair."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.evaluation.classes import Classes

pytestmark = pytest.mark.unit
LABELS = ["a", "b", "c"]


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
