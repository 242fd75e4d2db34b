"""Runs over rows with preferences: they learn them, resume to the same bytes, and learn no bad answer in silence."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import veneer
from veneer.data.formats import to_examples
from veneer.data.memory import rows_of
from veneer.errors import ConfigError, DataError, TrainingError
from veneer.planning.ledger import KINDS
from veneer.planning.machine import Machine
from veneer.runs.folder import RunFolder
from veneer.runs.history import RunHistory
from veneer.runs.objective import kto_notes, likelihood_notes, objective_of
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit

WORDS = [a + b for a in "bcdfgklm" for b in ("at", "ig", "op", "un", "ed", "ar")]
PAIRS = [
    {"prompt": f"{word}:", "chosen": (" yes", " no")[word[0] > "f"], "rejected": (" no", " yes")[word[0] > "f"]}
    for word in WORDS
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if place % 3 else "rejected"], "label": bool(place % 3)}
    for place, row in enumerate(PAIRS)
]
SINGLE = [{"prompt": "a", "completion": "b"}]
OPTIONS = {
    "learning_rate": 1e-2, "held_out": 12, "batch_size": 8, "evaluate_every": 3, "schedule": "constant", "steps": 6,
}  # fmt: skip


def train(model, folder, rows=PAIRS, **options):
    said = io.StringIO()
    named = {"adapter": str(model)} if RunFolder(model).exists else {"model": str(model)}
    given = {"data": rows, "output": str(folder), "console": Console(file=said, width=200), **OPTIONS, **options}
    return veneer.train(**named, **given), said.getvalue()


def resume(folder, **options):
    return veneer.resume(folder, console=Console(file=io.StringIO()), **options)


def adapter(folder):
    return (RunFolder(folder).adapter / "adapter_model.safetensors").read_bytes()


def reference(folder):
    return load_file(folder / "reference.safetensors")["log_probabilities"]


@pytest.mark.parametrize(
    ("objective", "rows", "start", "by"), [("dpo", PAIRS, math.log(2), 0.05), ("kto", JUDGED, 0.5, 0.03)]
)
def test_a_run_learns_what_is_preferred(objective, rows, start, by, tiny_folder, tmp_path):
    result, said = train(tiny_folder, tmp_path / "run", rows, micro_batch_size=3, steps=9)
    assert f"Chosen by auto: objective {objective}" in said
    assert "Reference: the log-probabilities of 48 rows, before training." in said
    assert "rewards " in said
    assert result.loss_before == pytest.approx(start, abs=1e-6)
    assert result.loss_after < result.loss_before
    run = RunHistory.read(tmp_path / "run")
    assert run.objective == objective
    assert [record["step"] for record in run.rewards] == [0, 3, 6, 9]
    assert "held_out_perplexity" not in run.held_out[0]
    assert run.rewards[-1]["held_out_reward_margin"] > run.rewards[0]["held_out_reward_margin"] + by
    assert run.rewards[-1]["held_out_reward_accuracy"] > 0.5


def test_orpo_needs_no_reference(tiny_folder, tmp_path):
    result, said = train(tiny_folder, tmp_path / "run", objective="orpo", beta=1.0)
    assert "Reference" not in said
    assert not (tmp_path / "run" / "reference.safetensors").exists()
    assert result.loss_after < result.loss_before


class PowerCut:
    def on_step(self, record):
        if record.step == 5:
            raise RuntimeError("power cut")

    def on_evaluation(self, record):
        pass


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        (PAIRS, {}),
        (JUDGED, {}),
        (PAIRS, {"storage": "nf4"}),
        (PAIRS, {"method": "adalora", "target_rank": 2, "initial_rank": 4, "tinit": 1, "tfinal": 2}),
    ],
    ids=["dpo", "kto", "nf4", "adalora"],
)
def test_a_stopped_run_resumes_to_the_same_bytes(rows, more, tiny_folder, tmp_path):
    options = {"dropout": 0.1, "checkpoint_every": 2, **more}
    train(tiny_folder, tmp_path / "whole", rows, **options)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny_folder, tmp_path / "cut", rows, callbacks=[PowerCut()], **options)
    resume(tmp_path / "cut")
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


def test_a_run_that_is_given_more_steps_ends_as_one_that_had_them_from_the_start(tiny_folder, tmp_path):
    train(tiny_folder, tmp_path / "longer", steps=2)
    assert int(reference(tmp_path / "longer").isnan().any(1).sum()) == 36 - 2 * 8, "no step takes the others"
    resume(tmp_path / "longer", steps=6)
    train(tiny_folder, tmp_path / "whole")
    assert torch.equal(reference(tmp_path / "longer"), reference(tmp_path / "whole"))
    assert adapter(tmp_path / "longer") == adapter(tmp_path / "whole")


def test_a_run_without_its_reference_does_not_go_on(tiny_folder, tmp_path):
    train(tiny_folder, tmp_path / "run", steps=2, held_out=0)
    file = tmp_path / "run" / "reference.safetensors"
    for damage in (lambda: file.write_bytes(b"no"), file.unlink):
        damage()
        with pytest.raises(TrainingError, match=r"reference.safetensors cannot be read .* Restore the file, or start"):
            resume(tmp_path / "run", steps=4)


def test_the_reference_of_trained_weights_is_the_model_as_it_was(tiny_folder, tmp_path):
    result, _ = train(tiny_folder, tmp_path / "run", method="full", learning_rate=1e-3)
    assert result.loss_before == pytest.approx(math.log(2), abs=1e-6)
    assert result.loss_after < result.loss_before


def test_a_run_from_an_adapter_measures_against_that_adapter(finished_run, tmp_path):
    result, _ = train(finished_run, tmp_path / "run", learning_rate=1e-3, steps=3)
    assert result.loss_before == pytest.approx(math.log(2), abs=1e-6)
    assert reference(tmp_path / "run")[:, 0].nanmean() > -2, "the base finds these answers far less likely"


def test_over_a_base_in_codes(tiny_folder, tmp_path):
    result, _ = train(tiny_folder, tmp_path / "run", storage="nf4")
    assert result.loss_before == pytest.approx(math.log(2), abs=1e-6)
    assert result.loss_after < result.loss_before


def examples(rows):
    return to_examples(rows_of(rows)).items


def asked(objective, rows, kind="causal", **options):
    return objective_of(TrainConfig(model="m", data="d", output="o", objective=objective, **options), rows, [], kind)


def test_the_objective_is_that_of_the_rows():
    assert [asked("auto", examples(rows)) for rows in (PAIRS, JUDGED, SINGLE)] == ["dpo", "kto", "likelihood"]
    assert [asked(name, examples(PAIRS)) for name in ("orpo", "kto", "likelihood")] == ["orpo", "kto", "likelihood"]


@pytest.mark.parametrize(
    ("rows", "options", "error", "match"),
    [
        (
            SINGLE,
            {"objective": "dpo"},
            DataError,
            "given rows has one answer, and objective: dpo compares a chosen and",
        ),
        (JUDGED, {"objective": "orpo"}, DataError, "has one answer, and objective: orpo compares"),
        (SINGLE, {"objective": "kto"}, DataError, "kto needs answers that are labelled good or bad"),
        (SINGLE, {"objective": "auto", "beta": 0.5}, ConfigError, "beta is an option of .*, and the objective is like"),
        (PAIRS, {"objective": "auto", "label_smoothing": 0.1}, ConfigError, "of objective: likelihood, and the .* dpo"),
        (
            PAIRS,
            {"objective": "auto", "kind": "seq2seq"},
            ConfigError,
            "go on with a text, and this one is for seq2seq",
        ),
    ],
)
def test_rows_and_options_of_another_objective_are_refused(rows, options, error, match):
    with pytest.raises(error, match=match):
        asked(rows=examples(rows), **options)


def test_likelihood_says_what_it_does_not_learn():
    assert likelihood_notes(examples(SINGLE)) == []
    assert likelihood_notes(examples(PAIRS[:1])) == [
        "1 row (row 1 of the given rows) with two answers: the chosen one is learned, the rejected one is not used."
    ]
    assert likelihood_notes(examples(JUDGED[:2])) == [
        "1 row (row 1 of the given rows) left out, because the label says that the answer is bad."
    ]


def test_kto_says_which_weights_would_weigh_alike():
    config = TrainConfig(model="m", data="d", output="o", objective="kto")
    assert kto_notes(config, examples(PAIRS)) == []
    (said,) = kto_notes(config, examples(JUDGED))
    assert said.startswith("32 good and 16 bad answers: with the weights 1 and 1 they do not weigh alike. ")
    assert said.endswith("would take a desirable_weight from 0.5 to 0.67.")
    assert kto_notes(config.model_copy(update={"desirable_weight": 0.6}), examples(JUDGED)) == []
    assert kto_notes(config, examples(JUDGED[1:2])) == ["All answers are good ones; KTO learns little from one kind."]


def test_a_classifier_is_refused(tiny_encoder, tmp_path):
    with pytest.raises(DataError, match="says which answer is better, and a classifier learns none of that"):
        train(tiny_encoder, tmp_path / "run")


def test_the_plan_counts_both_answers_and_the_reference(tiny_folder, monkeypatch):
    rates = {kind: 1e11 if kind in ("products", "attention") else 1e10 for kind in KINDS}
    monkeypatch.setattr("veneer.commands.plan.measured", lambda **_: Machine(rates, 1e-6, 4 * 10**8, 4 * 10**8))

    def planned(objective, rows=PAIRS):
        return veneer.plan(str(tiny_folder), data=rows, batch_size=8, steps=6, held_out=12, objective=objective)

    likelihood, dpo, judged = planned("likelihood"), planned("auto"), planned("auto", JUDGED)
    assert dpo.plan.tokens > 1.8 * likelihood.plan.tokens
    assert dpo.plan.terms["saved activations"] > 1.7 * likelihood.plan.terms["saved activations"]
    assert dpo.reference_seconds > 0 == likelihood.reference_seconds
    assert dpo.run_seconds == pytest.approx(
        dpo.plan.step_seconds * dpo.rows.work.steps + dpo.reference_seconds, rel=1e-6
    )
    assert "A row is two answers, each after its prompt: twice the tokens." in dpo.lines()
    assert any("before the first one, for the reference." in line for line in dpo.lines())
    # The other answer passes through the model as well, and nothing of it is kept.
    assert judged.plan.terms["saved activations"] < 0.7 * dpo.plan.terms["saved activations"]
    without = veneer.plan(str(tiny_folder), batch_size=8, objective="dpo", steps=6)
    assert without.plan.tokens == 2 * 8 * without.assumed
