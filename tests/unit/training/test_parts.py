"""Batches, schedule and configuration of a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.labels import IGNORE, Tokens
from veneer.errors import ConfigError
from veneer.training.batches import Batches, by_length, collate
from veneer.training.config import TrainConfig
from veneer.training.schedule import learning_rate

pytestmark = pytest.mark.unit


def _rows(lengths):
    return [Tokens([7] * n, [IGNORE] * (n - 1) + [7], f"d:{i}") for i, n in enumerate(lengths)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3))
def test_every_row_is_used_once_an_epoch(lengths, size, seed):
    rows = _rows(lengths)
    batches = Batches(rows, size, seed)
    for epoch in range(2):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        used = [row.where for step in steps for row in batches.rows(step)]
        assert sorted(used) == sorted(row.where for row in rows)
        assert all(len(batches.rows(step)) <= size for step in steps)


def test_a_steps_rows_are_a_function_of_its_number_and_the_seed():
    rows = _rows(range(1, 60))
    forward, backward = Batches(rows, 8, 0), Batches(rows, 8, 0)
    assert [forward.rows(s) for s in range(20)] == [backward.rows(s) for s in reversed(range(20))][::-1]
    assert [forward.rows(s) for s in range(8)] != [Batches(rows, 8, 1).rows(s) for s in range(8)]
    assert [forward.rows(s) for s in range(8)] != [forward.rows(s) for s in range(8, 16)], "epochs differ"


def test_rows_of_like_length_go_together():
    rows = _rows([1, 50] * 40)
    lengths = [{len(row.ids) for row in Batches(rows, 8, 0).rows(step)} for step in range(10)]
    assert all(len(found) == 1 for found in lengths)
    assert {frozenset(found) for found in lengths[:5]} == {frozenset({1}), frozenset({50})}, "in random order"
    assert [len(batch[0].ids) for batch in by_length(rows, 40)] == [50, 1]


def test_padding_is_neither_attended_to_nor_learned():
    batch = collate(_rows([2, 4]), pad=7)
    assert batch.ids.tolist() == [[7, 7, 7, 7], [7, 7, 7, 7]]
    assert batch.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORE, 7, IGNORE, IGNORE], [IGNORE, IGNORE, IGNORE, 7]]


def test_schedules():
    def rates(schedule, warmup=0.0):
        return [learning_rate(step, 10, 1.0, schedule, warmup) for step in range(10)]

    assert rates("constant") == [1.0] * 10
    assert rates("linear") == pytest.approx([1 - step / 10 for step in range(10)])
    assert rates("cosine")[5] == pytest.approx(0.5)
    assert rates("linear", 0.4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates("linear", 4) == rates("linear", 0.4)


def _config(**options):
    return TrainConfig(**{"model": "m", "data": "d", "output": "o", **options})


def test_a_config_survives_its_file(tmp_path):
    config = _config(targets=["q_proj"], rank_pattern={"q_proj": 4}, learning_rate=3e-4, held_out="x.jsonl")
    config.write(tmp_path / "config.yaml")
    assert TrainConfig.read(tmp_path / "config.yaml") == config
    assert TrainConfig.read(tmp_path / "config.yaml", rank=2).rank == 2
    assert config.update(1).rank_pattern == {"q_proj": 4}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stepz": 3}, r"TrainConfig has no option 'stepz'. Did you mean 'steps'"),
        ({"schedule": "cosin"}, r"schedule = 'cosin' is not valid.*'cosine'"),
        ({"micro_batch_size": 32}, r"micro_batch_size = 32 is more than batch_size = 16"),
        ({"method": "dora"}, r"method = 'dora'"),
        ({"steps": "many"}, r"steps = 'many'"),
    ],
)
def test_options_that_make_no_sense(options, match):
    with pytest.raises(ConfigError, match=match):
        _config(**options)


def test_what_is_needed_is_named():
    with pytest.raises(ConfigError, match="Needed and not given: data"):
        TrainConfig(model="m", output="o")


@pytest.mark.parametrize(("text", "match"), [("- a", "does not hold options"), ("a: [", "cannot be read as YAML")])
def test_bad_yaml(tmp_path, text, match):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        TrainConfig.read(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"There is no file .*rum.yaml. Did you mean '.*run.yaml'"):
        TrainConfig.read(tmp_path / "rum.yaml")
