"""Classes are looked at before a model is made of them."""

from __future__ import annotations

import pytest

from veneer.data.classes import classes_of, counted_classes, weights_of
from veneer.data.formats import Example, to_examples
from veneer.data.read import Row
from veneer.errors import DataError

pytestmark = pytest.mark.unit


def _labelled(*labels):
    return to_examples([Row({"text": f"t{i}", "label": label}, f"d:{i}") for i, label in enumerate(labels)])


def _rows(*labels):
    return [Example(f"d:{i}", prompt="t", answer=label) for i, label in enumerate(labels)]


def test_a_blank_label_is_no_class():
    examples = _labelled("pos", "", " ", None, float("nan"), "neg")
    assert [example.answer for example in examples.items] == ["pos", "neg"]
    assert examples.notes() == ["4 rows (d:1, d:2, d:3, …) left out: the label is empty."]
    with pytest.raises(DataError, match=r"^None of the 2 rows has a label; the first is d:0"):
        _labelled("", None)


def test_a_whole_number_that_pandas_made_a_float_is_that_number():
    assert [example.answer for example in _labelled(1.0, 0, 2.0).items] == ["1", "0", "2"]
    with pytest.raises(DataError, match=r"^d:1: label is a float \(0.5\); a class is a name or a whole number"):
        _labelled(1.0, 0.5)


def test_classes_are_those_of_both_sides():
    assert classes_of(_rows("b", "a", "b"), _rows("a")) == {"a": 2, "b": 2}
    assert counted_classes({"a": 2, "b": 1200, "c": 2}) == "b 1,200, a 2, c 2"
    assert counted_classes(dict.fromkeys("abcdefghijklmn", 1)).endswith("l 1, and 2 more")


def test_rows_that_make_no_classes_are_refused():
    with pytest.raises(DataError, match=r"^All 2 training rows have the class 'a'; a classifier needs rows of two"):
        classes_of(_rows("a", "a"), [])
    with pytest.raises(DataError, match=r"^d:0 has the label 'goood', which no training row has; .* mean 'good'"):
        classes_of(_rows("good", "bad"), _rows("goood"))


def test_balanced_weights_are_those_of_scikit_learn():
    """Its documentation: n_samples / (n_classes * np.bincount(y))."""
    weights, said = weights_of("balanced", ["a", "b", "c"], _rows("a", "a", "a", "b", "c", "c"))
    assert weights == {"a": 6 / (3 * 3), "b": 6 / 3, "c": 6 / (3 * 2)}
    assert said == "Weights of the classes in the loss: a × 0.6667 (3 rows), c × 1 (2 rows), b × 2 (1 rows)."
    # A class of the model that no row has weighs nothing in training, and takes none of the others' weight.
    assert weights_of("balanced", ["a", "b", "z"], _rows("a", "a", "b"))[0] == {"a": 0.75, "b": 1.5, "z": 1.0}


def test_balanced_weights_of_several_labels_are_rows_without_by_rows_with():
    """As the documentation of torch's BCEWithLogitsLoss advises: 100 rows with and 300 without → 3."""
    labels = [("a", "d"), ("a", "b", "d"), ("d",), ("a", "d")]
    rows = [Example(f"d:{place}", prompt="t", labels=names) for place, names in enumerate(labels)]
    weights, said = weights_of("balanced", ["a", "b", "c", "d"], rows, several=True)
    assert weights == {"a": 1 / 3, "b": 3.0, "c": 1.0, "d": 1.0}
    assert said.startswith("Weights of the labels in the rows that have them: d × 1 (4 rows), a × 0.3333 (3 rows), ")
    assert weights_of({"b": 2}, ["a", "b"], rows, several=True)[0] == {"a": 1.0, "b": 2.0}


def test_weights_by_name_leave_the_others_at_one():
    assert weights_of({"b": 3}, ["a", "b"], _rows("a", "b"))[0] == {"a": 1.0, "b": 3.0}
    with pytest.raises(
        DataError, match=r"^class_weights names 'spma', which is none of the classes: ham, spam\. .*'spam'"
    ):
        weights_of({"spma": 3}, ["ham", "spam"], _rows("ham", "spam"))
