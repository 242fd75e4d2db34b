"""Rows in memory: the same examples as from a file, and one sentence for anything that is none."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.memory import rows_of, write_rows
from veneer.data.read import read_rows
from veneer.errors import DataError

pytestmark = pytest.mark.unit

ROWS = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "é\n", "completion": " 3"}]


@pytest.mark.parametrize(
    "data",
    [ROWS, tuple(ROWS), datasets.Dataset.from_list(ROWS), pd.DataFrame(ROWS), pl.DataFrame(ROWS)],
    ids=["list", "tuple", "data set", "pandas", "polars"],
)
def test_every_kind_gives_the_same_rows(data):
    assert [row.fields for row in rows_of(data)] == ROWS


def test_a_path_a_list_of_paths_and_a_mixture(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_rows(rows_of(ROWS), file)
    assert [row.fields for row in rows_of(file)] == ROWS
    assert [row.fields for row in rows_of([str(file), file])] == ROWS * 2
    assert [row.fields for row in rows_of([file, pd.DataFrame(ROWS), ROWS])] == ROWS * 3


def test_missing_values_and_arrays_become_json(tmp_path):
    frame = pd.DataFrame({"text": ["a", None], "label": [1, np.nan], "tags": [np.array([1, 2]), ["x"]]})
    assert [row.fields for row in rows_of(frame)] == [
        {"text": "a", "label": 1.0, "tags": [1, 2]}, {"text": None, "label": None, "tags": ["x"]},
    ]  # fmt: skip


def test_a_class_of_a_data_set_is_its_name():
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": -1}], features=features)
    assert [row.fields["label"] for row in rows_of(data)] == ["yes", None]


@given(st.lists(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()), min_size=1))
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    given_rows = [{"text": "x", **row} for row in rows]
    try:
        json.dumps(given_rows, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    write_rows(rows_of(given_rows), file)
    assert [row.fields for row in read_rows(file)] == given_rows


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (3, r"data is a int; it may be a path or name, a list of dicts"),
        ({"prompt": "a"}, r"data is a dict; it may be"),
        ([], r"The given data holds no rows\."),
        ([{"text": "a"}, "b"], r"row 2 of the given rows is a str, not a dict of named columns\."),
        ([{"text": object()}], r"row 1 of the given rows, column text holds a object, which is no text, number"),
        (datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}), r"give one of its splits: data\['test'\]"),
    ],
)
def test_anything_else_is_one_sentence_that_does_not_repeat_it(data, sentence):
    with pytest.raises(DataError, match=sentence) as refused:
        rows_of(data)
    assert len(str(refused.value)) < 250
