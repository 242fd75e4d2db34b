"""What a classifier is asked, and its labels as those of tokens."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest

from veneer.data.classes import head_for
from veneer.data.columns import Reading
from veneer.data.formats import Example, labels_in, named_labels, to_examples
from veneer.data.problems import number_of, target_of
from veneer.data.read import Row
from veneer.data.split import split
from veneer.errors import DataError
from veneer.models.problems import problem_of

pytestmark = pytest.mark.unit


def _read(*rows, **how):
    return to_examples([Row(row, f"d:{place}") for place, row in enumerate(rows, start=1)], Reading(**how))


def _config(outputs, kind=None):
    return SimpleNamespace(id2label=dict.fromkeys(range(outputs)), problem_type=kind)


def test_the_problem_is_that_of_transformers():
    assert problem_of(_config(3)) == "classification"
    assert problem_of(_config(1)) == "regression"
    assert problem_of(_config(3, "multi_label_classification")) == "multi-label"
    assert problem_of(_config(1, "multi_label_classification")) == "multi-label"
    assert problem_of(_config(2, "single_label_classification")) == "classification"


def test_rows_of_several_labels():
    read = _read({"text": "a", "labels": ["y", "x", "y"]}, {"text": "b", "labels": []}, {"text": "c", "labels": None})
    assert read.shape == "text/labels"
    assert [labels_in(example) for example in read.items] == [("y", "x"), ()]
    assert [example.answer for example in read.items] == ["x, y", ""]
    assert read.left_out() == ["1 row (d:3) left out: the label is empty."]
    assert named_labels(["b", "a"]) == "a, b"


def test_lists_of_one_label_each_are_its_class():
    read = _read({"text": "a", "labels": ["x"]}, {"text": "b", "labels": ["y"]})
    assert (read.shape, [example.answer for example in read.items]) == ("text/label", ["x", "y"])
    asked = _read({"text": "a", "labels": ["x"]}, shape="text/labels")
    assert (asked.shape, asked.items[0].labels) == ("text/labels", ("x",))


def test_another_column_may_have_the_labels():
    rows = {"text": "a", "genres": ["x", "y"]}
    assert _read(rows).shape == "text"
    assert _read(rows, columns={"labels": "genres"}).items[0].labels == ("x", "y")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("x,y", r"^d:1: labels is a text, not a list of names; one label a row belongs into a column label"),
        ([["x"]], r"^d:1: labels is a list; a class is a name or a whole number"),
        (["x", " "], r"^d:1: labels has an empty name"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(value, match):
    with pytest.raises(DataError, match=match):
        _read({"text": "a", "labels": value}, shape="text/labels")


def test_numbers_are_classes_unless_somebody_says_otherwise():
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    assert _read(*rows).shape == "text/label"
    assert _read(*rows, numbers=True).shape == "text/number"
    assert _read(*rows, shape="text/number").shape == "text/number"
    assert [number_of(example) for example in _read({"text": "a", "label": "-1.5e2"}, numbers=True).items] == [-150.0]
    with pytest.raises(DataError, match=r"^d:1: label is a float \(0.5\).* \(to learn numbers: task: regression\)"):
        _read({"text": "a", "label": 0.5})


@pytest.mark.parametrize("value", ["x", True, float("inf"), "nan", [1]])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(DataError, match=r"^d:1: label is .* no finite number"):
        _read({"text": "a", "label": value}, numbers=True)


def test_a_target():
    row = Example("d:1", prompt="t", labels=("c", "a"))
    assert target_of(row, "multi-label", ["a", "b", "c"]) == [1, 0, 1]
    assert target_of(Example("d:1", prompt="t", answer=" b"), "multi-label", ["a", "b", "c"]) == [0, 1, 0]
    assert target_of(Example("d:1", prompt="t", answer=" b"), "classification", ["a", "b", "c"]) == [1]
    (bits,) = target_of(Example("d:1", prompt="t", answer="0.1"), "regression", ["LABEL_0"])
    assert struct.pack("<i", bits) == struct.pack("<f", 0.1)
    with pytest.raises(DataError, match=r"^d:1 has the label 'd', which is not one of the model's: a, b"):
        target_of(Example("d:1", prompt="t", labels=("a", "d")), "multi-label", ["a", "b"])
    with pytest.raises(DataError, match=r"^d:1 has the label 'good', which is no number; task: regression"):
        target_of(Example("d:1", prompt="t", answer="good"), "regression", ["LABEL_0"])
    with pytest.raises(DataError, match=r"^d:1 has the label 1e\+40, which is too large"):
        target_of(Example("d:1", prompt="t", answer="1e40"), "regression", ["LABEL_0"])


def test_no_bits_of_a_number_are_those_of_a_label_that_is_ignored():
    (number,) = struct.unpack("<f", struct.pack("<i", -100))
    assert number != number


def test_the_head_that_rows_make():
    rows = [Example("d:1", prompt="t", labels=("a", "b")), Example("d:2", prompt="t", labels=())]
    assert head_for("multi-label", rows, rows[:1]) == (
        ["a", "b"], "2 labels, any of which a row may have: a 2, b 2. 1 row has none of them."
    )  # fmt: skip
    with pytest.raises(DataError, match="All 1 training rows have the same labels"):
        head_for("multi-label", rows[:1], [])
    with pytest.raises(DataError, match=r"^d:3 has the label 'c', which no training row has"):
        head_for("multi-label", rows, [Example("d:3", prompt="t", labels=("c",))])
    numbers = [Example(f"d:{n}", prompt="t", answer=n) for n in ("1", "2.5", "-3")]
    assert head_for("regression", numbers, []) == (
        ["LABEL_0"], "The labels are numbers from -3 to 2.5, with a mean of 0.1667."
    )  # fmt: skip
    with pytest.raises(DataError, match="All 2 rows have the number 1; there is nothing to learn"):
        head_for("regression", numbers[:1] * 2, [])


def test_training_keeps_a_row_of_each_label():
    rows = [
        Example(f"d:{place}", prompt=f"text {chr(97 + place) * 4}", answer="a", labels=("a",)) for place in range(9)
    ]
    rows.append(Example("d:9", prompt="other words", answer="a, rare", labels=("a", "rare")))
    for seed in range(20):
        found = split(rows, 5, seed, classes=True)
        assert any("rare" in labels_in(row) for row in found.train)
    assert any("1 class occurs once among the rows (rare)" in note for note in found.notes)
