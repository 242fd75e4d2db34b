"""Held-out rows that a data set brings; and weights of sources where no row is learned."""

from __future__ import annotations

import io
import json

import datasets
import pytest
from rich.console import Console

import veneer
from veneer.errors import DataError
from veneer.runs.folder import RunFolder
from veneer.runs.rows import held_out_of
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit

ROWS = [{"prompt": f"{a}{b}:", "completion": " yes" if a < "g" else " no"} for a in "bcdfgklm" for b in ("at", "ig")]


@pytest.fixture
def data_set(tmp_path):
    folder = tmp_path / "set"
    sides = {"train": ROWS[:12], "validation": ROWS[12:]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in sides.items()}).save_to_disk(folder)
    return folder


def train(model, data, folder, **options):
    console = Console(file=io.StringIO(), width=500)
    given = {"steps": 2, "rank": 2, "batch_size": 4, "checkpoint_every": 1}
    result = veneer.train(str(model), data=str(data), output=str(folder), console=console, **{**given, **options})
    return result, console.file.getvalue()


def test_they_are_held_out_unless_somebody_says_otherwise(data_set, tiny_folder, tmp_path):
    result, shown = train(tiny_folder, data_set, tmp_path / "run")
    assert "12 rows to train on, 4 held out" in shown
    assert f"Held out are the rows of {data_set}:validation, which come with the others; held_out decides" in shown
    assert veneer.evaluate(result.folder, examples=0).rows == 4
    _, shown = train(tiny_folder, data_set, tmp_path / "asked", held_out=3)
    assert "9 rows to train on, 3 held out" in shown
    assert "Held out are" not in shown


def test_a_run_from_before_goes_on_as_it_began(data_set, tiny_folder, tmp_path):
    result, _ = train(tiny_folder, data_set, tmp_path / "run", held_out=0.1)
    run = RunFolder(result.folder)
    rows = json.loads(run.rows_file.read_text())
    del rows["own_validation"]
    run.rows_file.write_text(json.dumps(rows))
    text = run.config_file.read_text()
    assert "held_out: 0.1" in text
    run.config_file.write_text(text.replace("held_out: 0.1", "held_out: auto"))
    assert held_out_of(run.config()) == 0.1
    veneer.resume(result.folder, steps=3, console=Console(file=io.StringIO()))
    fresh = TrainConfig(model="m", data=str(data_set), output=str(tmp_path / "fresh"))
    assert held_out_of(fresh) == f"{data_set}:validation"


def test_weights_are_refused_where_no_row_is_learned(finished_run, tiny_folder, rows_file, tmp_path):
    weighted = f"{rows_file}=2"
    said = "rows.jsonl=2 says how often its rows are learned, which means nothing"
    with pytest.raises(DataError, match=f"{said} where rows are measured; leave out =2"):
        veneer.evaluate(finished_run, data=weighted)
    with pytest.raises(DataError, match=f"{said} here; leave out =2"):
        veneer.predict(finished_run, data=weighted, console=Console(file=io.StringIO()))
    with pytest.raises(DataError, match=f"{said} where rows are held out; leave out =2"):
        train(tiny_folder, rows_file, tmp_path / "run", held_out=weighted)
    assert not (tmp_path / "run" / "config.yaml").exists()
