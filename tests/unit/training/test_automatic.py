"""What auto stands for: by the method, the model's width and the number of rows."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from veneer.errors import ConfigError
from veneer.runs.folder import RunFolder
from veneer.runs.train import resume, train
from veneer.training.automatic import EPOCHS, EVALUATE, PATIENCE, RATES, STEPS, Size, automatic, rate_of, sentence
from veneer.training.config import RunConfig, TrainConfig

pytestmark = pytest.mark.unit
QUIET = Console(quiet=True)


def asked(**options):
    return TrainConfig(**{"model": "m", "data": "d", "output": "o", **options})


def test_the_rate_is_the_methods_and_falls_with_the_width_and_in_long_runs():
    assert {method: rate_of(method, 576, 12) for method in RATES} == RATES
    assert rate_of("lora", 384, 40) == RATES["lora"], "narrower models were measured, and need no more"
    assert rate_of("lora", 4096, 40) == float(f"{RATES['lora'] * 576 / 4096:.2g}")
    assert rate_of("full", 576, 40) * 10 == pytest.approx(rate_of("lora", 576, 40))
    assert rate_of("lora", 576, 160) == RATES["lora"] / 2


def test_a_language_models_head_is_trained_like_the_model():
    assert automatic(asked(method="head"), Size(576, 12, 20))["learning_rate"] == RATES["full"]
    of_classes = Size(576, 12, 20, "classification")
    assert automatic(asked(method="head"), of_classes)["learning_rate"] == RATES["head"]


def test_few_rows_are_read_several_times_and_many_once():
    few = automatic(asked(), Size(576, 12, 20))
    assert few == {"learning_rate": RATES["lora"], "epochs": 3, "evaluate_every": 12, "patience": PATIENCE}
    assert automatic(asked(), Size(576, 1, 2))["epochs"] == EPOCHS
    many = automatic(asked(), Size(576, 2800, 5000))
    assert (many["epochs"], many["patience"]) == (1, 0)
    assert many["evaluate_every"] == 625, "measuring 5,000 rows every 50 steps would take longer than the training"


def test_what_is_given_is_not_chosen():
    config = asked(learning_rate=1e-3, epochs=3, evaluate_every=7, patience=2)
    assert automatic(config, Size(576, 12, 20)) == {}
    assert sentence(config, {}) == ""
    assert automatic(asked(steps=10), Size(576, 12, 20))["patience"] == 0, "steps that were asked for are all taken"
    assert automatic(asked(), Size(576, 12, 0))["patience"] == 0, "without held-out rows there is nothing to stop by"


def test_the_sentence_has_what_changes_the_run():
    size = Size(576, 12, 20)
    assert sentence(asked(), automatic(asked(), size)) == (
        "Chosen by auto: learning_rate 0.003, epochs 3, evaluate_every 12, patience 2."
    )
    assert sentence(asked(steps=10), automatic(asked(steps=10), size)) == "Chosen by auto: learning_rate 0.003."


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(0, 10**6), st.sampled_from(sorted(RATES)))
def test_any_size_gives_a_run(width, per_epoch, held_out, method):
    config = asked(method=method)
    chosen = automatic(config, Size(width, per_epoch, held_out))
    run = RunConfig.of(config, chosen)
    assert 0 < run.learning_rate <= RATES[method]
    assert 1 <= run.epochs <= EPOCHS
    assert run.evaluate_every >= min(EVALUATE, per_epoch)
    assert run.epochs * per_epoch >= STEPS or run.epochs == EPOCHS


@pytest.mark.parametrize(("objective", "rate"), [("likelihood", 3e-3), ("dpo", 9e-4), ("orpo", 9e-4), ("kto", 3e-4)])
def test_a_preference_has_a_part_of_likelihoods_rate(objective, rate):
    """docs/studies/learning-rate.md, Preferences: at a tenth, DPO learned a sixth of what its best rate did."""
    assert automatic(asked(), Size(576, 12, 16, objective=objective))["learning_rate"] == rate


def test_a_wrong_value_is_one_sentence():
    with pytest.raises(ConfigError, match=r"learning_rate = 0 is not valid: Input should be greater than 0, or 'auto'"):
        asked(learning_rate=0)
    with pytest.raises(ConfigError, match=r"epochs = 'often' is not valid: .*, or 'auto'\.$"):
        asked(epochs="often")


def test_a_run_writes_what_was_chosen_and_keeps_it(tiny_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}:", "completion": f" {n + 1}"}) + "\n" for n in range(40)))
    folder = RunFolder(tmp_path / "run")
    train(tiny_folder, data=rows, output=folder.path, steps=4, held_out=8, console=QUIET)
    assert yaml.safe_load(folder.config_file.read_text())["learning_rate"] == "auto"
    assert folder.chosen()["learning_rate"] == RATES["lora"]
    assert max(record.get("learning_rate", 0) for record in folder.metrics()) == RATES["lora"]

    other = json.loads(folder.rows_file.read_text())
    other["chosen"]["learning_rate"] = 1e-4  # as if an earlier version had chosen it
    folder.rows_file.write_text(json.dumps(other))
    resume(folder.path, steps=6, console=QUIET)
    assert folder.chosen()["learning_rate"] == 1e-4
    assert folder.metrics()[-2]["learning_rate"] <= 1e-4
