"""A classifier's run with weighted classes: what it says, keeps, and ends in when it is resumed."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

import veneer
from veneer.errors import ConfigError, DataError
from veneer.runs.folder import RunFolder
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit

ROWS = [{"text": f"{word} {place}", "label": "rare" if place % 4 == 0 else "often"}
        for place, word in enumerate(["ba", "mo", "ki", "lu"] * 8)]  # fmt: skip


def _train(model, folder, **options):
    console = Console(file=io.StringIO(), width=500)
    given = {
        "data": ROWS, "output": str(folder), "steps": 6, "rank": 2, "batch_size": 8, "held_out": 4, "dropout": 0.1,
        "checkpoint_every": 3, "evaluate_every": 3, "learning_rate": 1e-2,
    }  # fmt: skip
    result = veneer.train(str(model), console=console, **{**given, **options})
    return result, console.file.getvalue()


def _weights(folder):
    return (RunFolder(folder).adapter / "adapter_model.safetensors").read_bytes()


def test_the_weights_are_told_and_written(tiny_encoder, tmp_path):
    result, shown = _train(tiny_encoder, tmp_path / "run", class_weights="balanced")
    counts = [sum(row["label"] == name for row in ROWS) for name in ("often", "rare")]
    written = json.loads((result.folder / "rows.json").read_text())
    weights = written["chosen"]["class_weights"]
    assert list(weights) == ["often", "rare"]
    trained = {name: 28 / (2 * weight) for name, weight in weights.items()}  # rows by their weight
    assert sum(trained.values()) == pytest.approx(28)
    assert all(trained[name] <= count for name, count in zip(("often", "rare"), counts, strict=True))
    assert f"Weights of the classes in the loss: often × {weights['often']:.4g} ({trained['often']:.0f} rows)" in shown
    assert "Chosen by auto" not in shown or "class_weights" not in shown.split("Chosen by auto")[1].splitlines()[0]
    assert TrainConfig.read(result.folder / "config.yaml").class_weights == "balanced"


def test_they_change_what_is_learned_and_a_resumed_run_keeps_them(tiny_encoder, tmp_path):
    whole, _ = _train(tiny_encoder, tmp_path / "whole", class_weights={"rare": 5})
    plain, _ = _train(tiny_encoder, tmp_path / "plain")
    assert _weights(whole.folder) != _weights(plain.folder)
    _train(tiny_encoder, tmp_path / "half", class_weights={"rare": 5}, steps=3, schedule="constant", warmup=0)
    long, _ = _train(tiny_encoder, tmp_path / "long", class_weights={"rare": 5}, schedule="constant", warmup=0)
    veneer.resume(tmp_path / "half", steps=6, console=Console(file=io.StringIO()))
    assert _weights(tmp_path / "half") == _weights(long.folder)


def test_what_makes_no_sense_is_refused(tiny_encoder, tiny_folder, tmp_path):
    with pytest.raises(
        DataError, match=r"class_weights names 'rar', which is none of the classes: often, rare.*'rare'"
    ):
        _train(tiny_encoder, tmp_path / "run", class_weights={"rar": 2})
    with pytest.raises(ConfigError, match="class_weights weighs the classes of a classifier, and this model is causal"):
        _train(tiny_folder, tmp_path / "run", class_weights="balanced", data=ROWS)
    for wrong in ({"rare": 0}, {"rare": -1}, "even", {"rare": "x"}):
        with pytest.raises(ConfigError, match="class_weights"):
            TrainConfig(model="m", data="d", output="o", class_weights=wrong)


def test_the_command_line_takes_a_word_or_weights(veneer_command, tiny_encoder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for given, kept in (("balanced", "balanced"), ("rare=2.5,often=1", {"rare": 2.5, "often": 1.0})):
        output = tmp_path / given[:4]
        outcome = veneer_command(
            "train", "--model", tiny_encoder, "--data", path, "--output", output, "--steps", 1, "--class-weights", given
        )
        assert outcome.code == 0, outcome
        assert TrainConfig.read(output / "config.yaml").class_weights == kept


def test_weights_of_several_labels_are_told_and_change_what_is_learned(tiny_encoder, tmp_path):
    rows = [{"text": row["text"], "labels": ["rare"] * (row["label"] == "rare") + ["first"] * (place < 8)}
            for place, row in enumerate(ROWS)]  # fmt: skip
    whole, shown = _train(tiny_encoder, tmp_path / "run", data=rows, held_out=0, class_weights="balanced")
    assert "Weights of the labels in the rows that have them: first × 3 (8 rows), rare × 3 (8 rows)." in shown
    assert json.loads((whole.folder / "rows.json").read_text())["chosen"]["class_weights"] == {"first": 3, "rare": 3}
    plain, _ = _train(tiny_encoder, tmp_path / "plain", data=rows, held_out=0)
    assert _weights(whole.folder) != _weights(plain.folder)
