"""Rows in memory train the same run as their file, and the run's folder keeps them."""

from __future__ import annotations

import io
import json
import shutil

import pandas as pd
import pytest
from rich.console import Console

import veneer
from veneer.commands.evaluate import evaluate
from veneer.errors import DataError, VeneerError
from veneer.runs.folder import RunFolder

pytestmark = pytest.mark.unit


@pytest.fixture
def options(tiny_folder, tmp_path):
    return {
        "model": str(tiny_folder), "output": str(tmp_path / "run"), "steps": 4, "rank": 2, "batch_size": 8,
        "held_out": 8, "checkpoint_every": 2, "learning_rate": 1e-2, "console": Console(file=io.StringIO()),
    }  # fmt: skip


def _rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def _bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", [list, pd.DataFrame, lambda rows: [rows[:20], pd.DataFrame(rows[20:])]])
def test_they_end_in_the_same_bytes_as_their_file(options, rows_file, tmp_path, kind):
    rows = _rows(rows_file)
    of_file = veneer.train(**{**options, "data": rows_file, "output": tmp_path / "file"})
    result = veneer.train(**options, data=kind(rows))
    assert _bytes(result.folder) == _bytes(of_file.folder)
    assert _rows(RunFolder(result.folder).data_file) == rows


def test_a_run_over_them_is_moved_resumed_and_evaluated(options, rows_file, tmp_path):
    rows = _rows(rows_file)
    whole = veneer.train(**{**options, "held_out": rows[-8:]}, data=rows[:-8])
    moved = tmp_path / "elsewhere"
    shutil.copytree(whole.folder, moved)
    for later in ("adapter", "best", "checkpoints/step-000004"):
        shutil.rmtree(moved / later)
    shutil.rmtree(whole.folder / "checkpoints")
    whole_bytes = _bytes(whole.folder)
    shutil.rmtree(whole.folder)
    assert _bytes(veneer.resume(moved, console=options["console"]).folder) == whole_bytes
    assert evaluate(moved, examples=0).rows == 8


def test_what_is_no_rows_is_refused_before_anything_is_made(options, tmp_path):
    with pytest.raises(DataError, match=r"data is a object; it may be a path or name"):
        veneer.train(**options, data=object())
    with pytest.raises(VeneerError, match="data = 3 is not valid"):
        veneer.train(**options, data=3)
    assert not (tmp_path / "run").exists()
