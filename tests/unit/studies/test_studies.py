"""Every study on a tiny model: its rows mean what they say, and what was found follows from them."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path

import pytest

import tiny
import veneer
from veneer.errors import DataError, DivergedError, TargetError, TrainingError
from veneer.frozen.weight import frozen_weight
from veneer.reporting.study_page import study_page
from veneer.studies import run
from veneer.studies.budget import TUNING_SEED, BudgetStudy
from veneer.studies.config import StudyOptions
from veneer.studies.folder import columns_of, read_study_rows
from veneer.studies.kinds import STUDIES
from veneer.studies.learning_rate import LearningRateStudy
from veneer.studies.matrices import CHOICES, MatricesStudy, placed
from veneer.studies.methods import MethodsStudy
from veneer.studies.numbers import Metric, unlearned
from veneer.studies.rank import RankStudy
from veneer.studies.run import run_study
from veneer.studies.spectrum import SpectrumStudy
from veneer.studies.storage import STORAGES, StorageStudy, bits_and_error
from veneer.studies.study import MEASURED, key_of, located
from veneer.studies.trained import trained
from veneer.studies.work import work
from veneer.training.automatic import rate_of
from veneer.updates.select import modules_of

pytestmark = pytest.mark.unit
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def studied(rows_file, tmp_path, monkeypatch):
    """A function: run a study here, in this process; its rows and what was found."""
    monkeypatch.setattr(run, "in_a_process", work)

    def study(name: str, model: Path, **more):
        options = {"seeds": [0, 1], "steps": 6, "batch_size": 8, "held_out": 16, "learning_rate": 1e-2, **more}
        options = StudyOptions(model=str(model), data=str(rows_file), output=str(tmp_path / name), **options)
        folder = run_study(name, options, lambda text: None)
        told = json.loads((folder / "study.json").read_text())
        for plot in told["plots"]:
            assert (folder / plot).read_bytes().startswith(PNG)
        assert "<h1>" in study_page(folder), "veneer report reads it"
        rows = read_study_rows(folder, STUDIES[name])
        assert rows
        assert set(told["runs"]) == {row["run"] for row in rows}
        assert all(row.keys() == told["columns"].keys() for row in rows)
        measured = [row for row in rows if row["loss"] is not None]
        assert all(row["loss"] > 0 and 0 <= row["accuracy"] <= 1 and row["seconds"] >= 0 for row in measured)
        return rows, told["findings"]

    return study


def test_rank(studied, tiny_folder):
    rows, found = studied("rank", tiny_folder, ranks=[1, 2, 4], steps=10)
    trained = {(row["rank"], row["seed"]): row for row in rows if row["how"] == "trained"}
    cut = {(row["rank"], row["seed"]): row for row in rows if row["how"] == "cut"}
    assert trained.keys() == {(rank, seed) for rank in (1, 2, 4) for seed in (0, 1)}
    assert cut.keys() == {(rank, seed) for rank in (1, 2) for seed in (0, 1)}
    for place, row in cut.items():
        assert row["parameters"] == trained[place]["parameters"]
        assert row["loss"] != trained[place]["loss"]
    assert trained[2, 0]["parameters"] == 2 * trained[1, 0]["parameters"]
    assert {row["highest"] for row in cut.values()} == {4}
    decided = found.count("take rank ") + found.count("No rank is recommended")
    assert decided == found.count("Rank 4 cut by SVD: ") == 2, "by accuracy, and by loss"


def _ranked(accuracies: dict[int, list[float]]) -> str:
    study = RankStudy(StudyOptions(ranks=sorted(accuracies), seeds=[0, 1, 2]))
    rows = [
        dict.fromkeys(MEASURED)
        | {"how": "trained", "rank": rank, "accuracy": value, "loss": 1 - value, "parameters": 9}
        for rank, values in accuracies.items()
        for value in values
    ]
    return study.findings(rows)


@pytest.mark.parametrize(
    ("accuracies", "rank"),
    [
        ({1: [0.5, 0.5, 0.51], 4: [0.8, 0.79, 0.8], 16: [0.8, 0.81, 0.8]}, 16),
        ({1: [0.5, 0.5, 0.51], 4: [0.78, 0.82, 0.8], 16: [0.79, 0.84, 0.79]}, 4),
        ({1: [0.7, 0.9, 0.8], 4: [0.79, 0.8, 0.81], 16: [0.8, 0.81, 0.82]}, 1),
    ],
)
def test_the_rank_to_take_is_the_smallest_within_one_standard_error_of_the_best(accuracies, rank):
    assert _ranked(accuracies).count(f"take rank {rank}.") == 2


def _row(accuracy, largest, **more):
    return dict.fromkeys(MEASURED) | {
        "accuracy": accuracy, "largest_class": largest, "loss": 1 - accuracy, "parameters": 9, "peak_memory": 1,
        "seconds": 1.0, "learning_rate": 1.0, **more,
    }  # fmt: skip


_BEHIND = "Not above the share of the largest class, and so not recommended: "


def test_no_rank_is_taken_from_runs_that_have_not_learned():
    study = RankStudy(StudyOptions(ranks=[1, 4, 8], seeds=[0]))
    rows = [_row(share, 0.58, how="trained", rank=rank) for rank, share in {1: 0.58, 4: 0.50, 8: 0.60}.items()]
    said = study.findings(rows)
    assert said.count("take rank 8.") == 2, "not rank 1, within one standard error of it"
    assert said.endswith(f" {_BEHIND}rank 1, rank 4.")
    said = study.findings([_row(0.5, 0.58, how="trained", rank=rank) for rank in (1, 4, 8)])
    assert "take rank" not in said
    assert said.count("No rank is recommended.") == 2
    assert said.endswith(f" {_BEHIND}rank 1, rank 4, rank 8.")
    assert _BEHIND not in study.findings([_row(0.6, 0.58, how="trained", rank=rank) for rank in (1, 4, 8)])


def test_no_method_and_no_matrices_are_best_that_have_not_learned():
    methods = MethodsStudy(StudyOptions(seeds=[0]))
    rows = [_row(share, 0.5, method=method) for method, share in {"full": 0.5, "LoRA": 0.52}.items()]
    said = methods.findings(rows)
    assert "The best is LoRA; " in said
    assert f": none. {_BEHIND}full." in said
    said = methods.findings([row | {"accuracy": 0.5} for row in rows])
    assert "The best is none; within" in said
    assert f": none. {_BEHIND}full, LoRA." in said
    matrices = MatricesStudy(StudyOptions(seeds=[0]))
    rows = [_row(0.5 + (which == "qv") / 10, 0.5, matrices=which, rank=4) for which in CHOICES]
    said = matrices.findings(rows)
    assert "The best is qv." in said
    assert said.endswith(f"{_BEHIND}{', '.join(which for which in CHOICES if which != 'qv')}.")


def test_no_budget_is_ahead_by_runs_that_have_not_learned():
    study = BudgetStudy(StudyOptions(ranks=[1, 4], seeds=[0]))
    shares = {("rank 1", "LoRA"): 0.5, ("rank 1", "AdaLoRA"): 0.56}
    rows = [
        _row(shares.get((job.options["budget"], job.options["method"]), 0.8), 0.58, run=job.key)
        for job in study.jobs([])
    ]
    said = study.findings(rows)
    assert "AdaLoRA is ahead at 0 of 1 budgets." in said
    assert said.endswith(f" {_BEHIND}LoRA at rank 1, AdaLoRA at rank 1.")
    said = study.findings([row | {"accuracy": 0.5} for row in rows])
    assert f". No budget is compared. {_BEHIND}LoRA at rank 1, AdaLoRA at rank 1, LoRA at rank 4, " in said
    assert "is ahead" not in said


def test_a_rate_is_chosen_among_runs_that_learned():
    study = BudgetStudy(StudyOptions(ranks=[4], seeds=[0], rates=[1e-3, 1e-2]))
    jobs = {job.options["run"]["learning_rate"]: job.key for job in study.jobs([]) if job.options["method"] == "LoRA"}
    shares = {1e-3: (0.6, 0.58), 1e-2: (0.7, 0.75)}
    rows = [_row(*shares[rate], learning_rate=rate, run=key) for rate, key in jobs.items()]
    assert study.rate(rows, "rank 4", "LoRA") == 1e-3
    assert study.rate([row | {"largest_class": 0.9} for row in rows], "rank 4", "LoRA") == 1e-2, "of none, the best"


def test_no_storage_is_compared_with_one_that_has_not_learned():
    study = StorageStudy(StudyOptions(seeds=[0]))
    kept = [_row(0.5, None, what="kept", storage=s, bits=4.0, error=0.1, perplexity=None) for s in STORAGES]
    share = {"16-bit": 0.8, "int4": 0.5}
    trained = [_row(share.get(s, 0.8), 0.58, what="trained", storage=s, tokens_per_second=1.0) for s in STORAGES]
    said = study.findings(kept + trained)
    assert said.endswith(f"after training: int4. {_BEHIND}int4.")
    said = study.findings(kept + [row | {"accuracy": 0.5} if row["storage"] == "16-bit" else row for row in trained])
    assert "Worse than 16-bit" not in said
    assert said.endswith(f" {_BEHIND}16-bit, int4.")


def test_rows_of_the_first_version_are_read(tmp_path):
    """Which did not know the share of the largest class, so nothing is judged by it."""
    columns = [name for name in columns_of(RankStudy) if name != "largest_class"]
    (tmp_path / "runs.csv").write_text(",".join(columns) + "\n" + ",".join("1" for _ in columns) + "\n")
    (row,) = read_study_rows(tmp_path, RankStudy)
    assert list(row) == list(columns_of(RankStudy))
    assert row["largest_class"] is None
    assert unlearned({"a": [row]}) == []


def test_no_rate_is_best_that_has_not_learned():
    study = LearningRateStudy(StudyOptions(seeds=[0], methods=["lora"], held_out=100))
    shares = {1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.58}
    rows = [_row(share, 0.58, method="lora", chosen="given", learning_rate=r) for r, share in shares.items()]
    auto = rows[0] | {"chosen": "auto", "learning_rate": 2e-3, "accuracy": 0.72}
    said = study.findings([*rows, auto])
    assert "The best is auto (0.002)." in said
    assert said.endswith(f"{_BEHIND}0.001, 0.01.")
    said = study.findings([*rows, auto | {"accuracy": 0.3}])
    assert f"The best is 0.003. {_BEHIND}0.001, auto (0.002), 0.01." in said, "and auto is not compared with it"
    said = study.findings([row | {"accuracy": 0.2} for row in rows])
    assert f"The best is none. {_BEHIND}0.001, 0.003, 0.01." in said


def test_rows_of_one_class_that_are_all_right_are_not_behind():
    assert unlearned({"a": [_row(1.0, 1.0)], "b": [_row(0.9, 1.0)], "c": [_row(0.9, None)]}) == ["b"]


def test_a_loss_is_better_when_it_is_lower():
    rows = [{"loss": 0.2, "accuracy": None}, {"loss": 0.3, "accuracy": None}]
    metric = Metric.of(rows)
    assert metric.best({"a": 0.3, "b": 0.2}) == "b"
    assert metric.within(0.25, 0.2, 0.06)
    assert not metric.within(0.25, 0.2, 0.04)
    assert Metric.of([*rows, {"loss": 1, "accuracy": 0.5}]).column == "loss"
    assert metric.shown([0.2, 0.3]) == "0.250 ± 0.071"
    assert Metric("accuracy").shown([0.8, 0.9]) == "85.0 ± 7.1 %"
    assert Metric("accuracy").shown([0.8]) == "80.0 %"


def test_a_standard_error_pools_the_spreads():
    expected = pytest.approx((statistics.mean([2.0, 0.0]) / 2) ** 0.5)
    assert Metric("loss").standard_error([[1.0, 3.0], [2.0, 2.0]], 100) == expected
    assert Metric("accuracy").standard_error([[0.5], [0.4]], 100) == pytest.approx(0.05)


def test_one_seed_tells_no_standard_error_of_a_loss():
    """However much it looks like a share."""
    study = RankStudy(StudyOptions(ranks=[1, 8, 32], seeds=[1]))
    losses = {1: 0.364, 8: 0.250, 32: 0.221}
    rows = [
        dict.fromkeys(MEASURED) | {"how": "trained", "rank": rank, "loss": loss, "parameters": 9}
        for rank, loss in losses.items()
    ]
    rows += [row | {"how": "cut"} for row in rows[:2]]
    said = study.findings(rows)
    assert "within one standard error of it (not known with one seed) is rank 32: take rank 32." in said
    assert said.endswith("Rank 32 cut by SVD: rank 1 0.364, rank 8 0.250."), "nor how far it may be off"


def test_matrices(studied, tiny_folder):
    rows, found = studied("matrices", tiny_folder, rank=4, seeds=[0])
    assert [row["matrices"] for row in rows] == list(CHOICES)
    budget = next(row["parameters"] for row in rows if row["matrices"] == "qv")
    assert next(row["rank"] for row in rows if row["matrices"] == "qv") == 4
    assert all(abs(row["parameters"] / budget - 1) < 0.25 for row in rows), "to the nearest whole rank"
    assert "The best is " in found


@pytest.mark.parametrize(
    ("name", "mlp"), [("llama", 6), ("bert", 4), ("qwen3", 6), ("opt", 4), ("mistral", 6), ("phi", 4), ("t5", 8)]
)
def test_the_matrices_of_an_architecture(name, mlp):
    model = tiny.build(name)
    chosen = {which: placed(model, which, 8)[0] for which in CHOICES}
    layers = 6 if name == "t5" else 2  # of attention: T5's decoder attends to its encoder, too
    assert [len(chosen[role]) for role in ("q", "k", "v", "o", "qk", "qkvo")] == [
        layers, layers, layers, layers, 2 * layers, 4 * layers
    ]  # fmt: skip
    assert len(chosen["mlp"]) == mlp
    assert not set(chosen["mlp"]) & set(chosen["qkvo"])
    assert set(chosen["qkvo"]) < set(modules_of(model))


@pytest.mark.parametrize("name", ["gpt2", "gptneox", "phi3"])
def test_a_model_whose_attention_is_one_matrix_is_refused(name):
    with pytest.raises(TargetError, match="holds several in one"):
        placed(tiny.build(name), "q", 8)


def test_methods(studied, tiny_folder, tiny_encoder, tmp_path):
    rows, found = studied("methods", tiny_folder, seeds=[0])
    by = {row["method"]: row for row in rows if row["seed"] == 0}
    assert list(by) == [*("full", "LoRA", "AdaLoRA", "QLoRA", "DoRA", "LoRA+", "PiSSA", "NEFTune", "biases", "head")]
    assert len({by[method]["loss"] for method in ("LoRA", "DoRA", "LoRA+", "PiSSA", "NEFTune")}) == 5
    assert by["DoRA"]["parameters"] > by["LoRA"]["parameters"] == by["PiSSA"]["parameters"]
    assert by["full"]["parameters"] > by["head"]["parameters"] > 0
    assert by["LoRA"]["parameters"] == by["QLoRA"]["parameters"] == pytest.approx(by["AdaLoRA"]["parameters"], rel=0.2)
    assert by["full"]["learning_rate"] == pytest.approx(0.1 * by["LoRA"]["learning_rate"])
    assert by["biases"]["loss"] is None, "a Llama has none"
    assert found.endswith("This model's layers have no biases.")
    rows, found = (
        MethodsStudy.work(
            "trained",
            {"method": "biases", "run": {**_run(tiny_encoder, tmp_path), "method": "bias"}},
            tmp_path / "runs",
        )[0],
        "",
    )
    assert rows["parameters"] > 0


def _run(model: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "model": str(model), "data": str(tmp_path / "rows.jsonl"), "steps": 2, "batch_size": 8, "held_out": 16,
        "learning_rate": 1e-2, "evaluate_every": 0, "seed": 0,
    }  # fmt: skip


def test_learning_rate(studied, tiny_folder):
    rows, findings = studied(
        "learning-rate", tiny_folder, rates=[1e-3, 1e30], methods=["lora", "full"], learning_rate="auto", seeds=[0]
    )
    by = {(row["method"], row["chosen"], row["learning_rate"]): row for row in rows}
    autos = {method: rate_of(method, 32, 6) for method in ("lora", "full")}
    given = [("given", 1e-3), ("given", 1e30)]
    assert list(by) == [(m, *rate) for m in ("lora", "full") for rate in (("auto", autos[m]), *given)]
    assert by["full", "given", 1e30]["loss"] is None
    assert "lora, held-out accuracy: 0.001 " in findings, findings
    assert "The best is " in findings
    assert "Diverged: 1e+30." in findings


def test_the_rates_to_compare_are_around_autos():
    study = LearningRateStudy(StudyOptions(methods=["adalora"]))
    assert study.rates("adalora") == ["auto", 0.0009, 0.003, 0.009, 0.09]
    assert {job.options["run"]["learning_rate"] for job in study.jobs([])} == set(study.rates("adalora"))


def test_storage(studied, tiny_folder):
    rows, found = studied("storage", tiny_folder, seeds=[0])
    kept = {row["storage"]: row for row in rows if row["what"] == "kept"}
    trained = {row["storage"]: row for row in rows if row["what"] == "trained"}
    assert list(kept) == list(trained) == list(STORAGES)
    assert (kept["fp32"]["bits"], kept["fp32"]["error"], kept["16-bit"]["bits"]) == (32, 0, 16)
    assert 0 < kept["16-bit"]["error"] < kept["nf4 block 32"]["error"] < kept["nf4"]["error"] < kept["fp4"]["error"]
    assert 4 < kept["nf4 + DQ"]["bits"] < kept["nf4"]["bits"] == 4.5
    assert all(row["perplexity"] > 1 for row in kept.values())
    assert all(row["tokens_per_second"] > 0 for row in trained.values())
    assert len({row["loss"] for row in trained.values()}) == len(trained), "each over its own base"
    order = sorted(["nf4 block 32", "nf4", "nf4 + DQ", "fp4", "int4"], key=lambda name: kept[name]["error"])
    assert f"In 4 bits the error grows in the order {', '.join(order)}." in found


def test_the_error_is_that_of_the_loaded_model(tiny_folder):
    model, _ = veneer.load(tiny_folder)
    kept, _ = veneer.load(tiny_folder, **STORAGES["fp4"])
    name = "model.layers.1.mlp.up_proj"
    wrong = frozen_weight(kept.get_submodule(name)).dense() - model.get_submodule(name).weight
    for other in list(model.named_modules()):
        if other[0] != name and hasattr(other[1], "weight") and "proj" in other[0]:
            other[1].weight.data.zero_()
    expected = float(wrong.square().sum() / model.get_submodule(name).weight.square().sum())
    assert bits_and_error(model, STORAGES["fp4"])[1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("rates", "seeds"), [([], [0, 1]), ([1e-3, 1e-2, 1e30], [0])])
def test_budget(studied, tiny_folder, rates, seeds):
    rows, found = studied("budget", tiny_folder, ranks=[1, 2], rates=rates, seeds=seeds, steps=10)
    tuning = [row for row in rows if row["seed"] == TUNING_SEED]
    assert len(tuning) == 4 * len(rates)
    assert all((row["loss"] is None) == (row["learning_rate"] > 1) for row in tuning), (
        "one that diverges is none to choose"
    )
    assert all(row["tuning"] == (row["seed"] == TUNING_SEED) for row in rows)
    own = [row for row in rows if row["seed"] != TUNING_SEED]
    assert len(own) == 2 * 2 * len(seeds)
    for row in own:
        ranks = json.loads(row["ranks"])
        assert row["parameters"] > 0
        if row["method"] == "LoRA":
            assert set(ranks.values()) == {int(row["budget"].split()[1])}
            mine = [r for r in own if (r["budget"], r["method"]) == (row["budget"], "AdaLoRA")]
            assert all(r["parameters"] <= row["parameters"] for r in mine)
    for row in own:
        tried = [t for t in tuning if (t["budget"], t["method"]) == (row["budget"], row["method"])]
        if tried:
            best = max((t for t in tried if t["loss"] is not None), key=lambda t: t["accuracy"])
            assert row["learning_rate"] == best["learning_rate"]
    assert ("AdaLoRA is ahead at " in found) != ("No budget is compared." in found)


def test_rates_that_all_diverge_are_too_high(studied, tiny_folder):
    with pytest.raises(TrainingError, match=r"^LoRA diverged at all of the rates \[1e\+30\]; add lower ones\.$"):
        studied("budget", tiny_folder, ranks=[1], rates=[1e30], steps=10)


def _budget(values: dict[str, list[float]], seeds: list[int]) -> str:
    study = BudgetStudy(StudyOptions(ranks=[4], seeds=seeds))
    rows = [
        dict.fromkeys(MEASURED)
        | {"run": job.key, "accuracy": values[job.options["method"]][seeds.index(job.options["run"]["seed"])]}
        | {"loss": 1.0, "parameters": 9, "learning_rate": 1.0}
        for job in study.jobs([])
    ]
    return study.findings(rows)


def test_a_difference_of_budgets_counts_from_one_standard_error_of_it_on():
    said = _budget({"LoRA": [0.80, 0.82], "AdaLoRA": [0.83, 0.85]}, [0, 1])
    assert said.endswith("larger than one standard error of it (1.4 %) at: rank 4.")
    said = _budget({"LoRA": [0.80, 0.82], "AdaLoRA": [0.81, 0.83]}, [0, 1])
    assert said.endswith("(1.4 %) at: none.")
    said = _budget({"LoRA": [0.8500], "AdaLoRA": [0.8525]}, [0])
    assert said.endswith("(2.5 %) at: none."), "of one seed by the number of held-out rows"


def test_budgets_of_ones_own(tiny_folder, rows_file):
    options = StudyOptions(model=str(tiny_folder), data=str(rows_file), seeds=[0], rates=[1e-3])
    study = BudgetStudy(options, {"attention": {"targets": ["q_proj"], "rank": 3}})
    assert [job.options["lora"] for job in study.jobs([])] == [{"targets": ["q_proj"], "rank": 3}] * 2
    assert [job.options["run"]["seed"] for job in study.jobs([])] == [TUNING_SEED] * 2


@pytest.mark.parametrize("kind", ["generator", "classifier"])
def test_spectrum(studied, tiny_folder, tiny_encoder, kind):
    rows, found = studied("spectrum", tiny_folder if kind == "generator" else tiny_encoder, ranks=[2, 4], steps=20)
    by = {what: [row for row in rows if row["what"] == what] for what in dict.fromkeys(row["what"] for row in rows)}
    assert {what: len(its) for what, its in by.items()} == {
        "full": 2, "LoRA": 4, "base": 2, "part": 14, "matrices": 2, "matrix": 2 * len(by["matrix"]) // 2, "overlap": 7
    }  # fmt: skip
    for seed in (0, 1):
        parts = [row for row in by["part"] if row["seed"] == seed]
        energies = [row["share"] for row in parts]
        assert energies == sorted(energies)
        assert energies[-1] == pytest.approx(1), "64 are all of a tiny matrix"
        (whole,) = (row for row in by["matrices"] if row["seed"] == seed)
        assert parts[-1]["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        (base,) = (row for row in by["base"] if row["seed"] == seed)
        assert base["loss"] != whole["loss"]
    for row in by["matrix"]:
        values = json.loads(row["singular_values"])
        assert row["energy"] == pytest.approx(sum(value**2 for value in values), rel=1e-2)
        assert 1 <= row["rank"] <= len(values)
    for row in by["overlap"]:
        assert 0 <= row["phi_a"] <= 1
        assert 0 <= row["phi_b"] <= 1
        assert row["name"] in ("ranks 2 and 4 of one seed", "rank 4 of two seeds")
    assert ("not recommended: full fine-tuning." in found) == (
        statistics.mean(row["accuracy"] - row["largest_class"] for row in by["full"]) <= 0
    )
    assert "keeps this share of the gain in" in found or "no gain in accuracy" in found
    assert "φ of rank 4 of two seeds" in found


def test_studies_share_their_runs(studied, tiny_folder, tmp_path, monkeypatch):
    studied("rank", tiny_folder, ranks=[2, 4])
    before = set((tmp_path / "runs").iterdir())
    rows, _ = studied("spectrum", tiny_folder, ranks=[2, 4])
    new = set((tmp_path / "runs").iterdir()) - before
    assert len(new) == 2, "the two full ones alone"
    shared = [row for row in rows if row["what"] == "LoRA"]
    seen = {
        (row["rank"], row["seed"]): row["loss"]
        for row in read_study_rows(tmp_path / "rank", RankStudy)
        if row["how"] == "trained"
    }
    assert {(row["rank"], row["seed"]): row["loss"] for row in shared} == seen


def test_a_run_that_was_killed_goes_on(tiny_folder, rows_file, tmp_path):
    options = _run(tiny_folder, tmp_path) | {"rank": 2, "steps": 4}
    folder, whole = trained(options, tmp_path / "whole")
    broken = tmp_path / "broken" / key_of(options)
    veneer.train(output=str(broken), **(options | {"steps": 2}))
    (broken / "config.yaml").write_text((folder / "config.yaml").read_text())
    for part in ("adapter", "best"):
        shutil.rmtree(broken / part)
    _, resumed = trained(options, tmp_path / "broken")
    assert resumed["parameters"] == whole["parameters"]
    assert (broken / "measured.json").is_file()
    assert not (broken / "checkpoints").exists()


def test_a_run_goes_by_its_rows_and_not_by_their_name(tiny_folder, rows_file, tmp_path, monkeypatch):
    def key(data: object) -> str:
        study = RankStudy(StudyOptions(model=str(tiny_folder), data=str(data), ranks=[2], seeds=[0]))
        return study.jobs([])[0].key

    monkeypatch.chdir(rows_file.parent)
    before = key(rows_file)
    assert before == key(rows_file.name) == key(f"./{rows_file.name}")
    options = RankStudy(StudyOptions(model=str(tiny_folder), data=rows_file.name)).run(0, rank=2)
    rows_file.write_text(rows_file.read_text() + rows_file.read_text().splitlines()[0] + "\n")
    assert key(rows_file) != before
    with pytest.raises(DataError, match=r"rows\.jsonl was changed while the study ran; start the study again\.$"):
        trained(options, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_names_of_packaged_things_are_what_a_key_is_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bbc-topics").mkdir()
    assert located("smollm2-135m-instruct", "bbc-topics") == {"model": "smollm2-135m-instruct", "data": "bbc-topics"}


def test_a_model_that_was_written_anew_is_another_one(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    before = located(str(folder), "bbc-topics")
    assert before["content"].keys() == {"model"}
    assert located(str(folder), "bbc-topics") == before
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert located(str(folder), "bbc-topics") != before


def test_the_peak_of_training_is_that_of_the_process_that_trained(tiny_folder, rows_file, tmp_path, monkeypatch):
    """Killed after its last step, a run is only measured by the next process."""
    options = _run(tiny_folder, tmp_path) | {"rank": 2}
    folder = tmp_path / "runs" / key_of(options)
    with monkeypatch.context() as patch:
        patch.setattr("veneer.studies.trained.quality", lambda prepared: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(options, tmp_path / "runs")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records[-1 if "peak_memory" in records[-1] else -2]["peak_memory"] = 10**15
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert trained(options, tmp_path / "runs")[1]["peak_memory"] == 10**15


def test_another_rank_costs_its_own_runs_alone():
    few, more = (RankStudy(StudyOptions(ranks=ranks, seeds=[0])) for ranks in ([1, 2, 8], [1, 2, 4, 8]))
    done = [{"run": job.key} for job in few.jobs([])]
    done += [{"run": job.key} for job in few.jobs(done)]
    keys = {row["run"] for row in done}
    new = [job for job in more.jobs(done) if job.key not in keys]
    assert [(job.what, job.options["rank"]) for job in new] == [("trained", 4), ("cut", 4)]


def test_a_job_is_named_by_what_is_its_own():
    study = SpectrumStudy(StudyOptions(ranks=[2, 4], seeds=[0]))
    done = [{"run": job.key} for job in study.jobs([])]
    assert str(study.jobs(done)[-1]) == "spectrum: overlap, which ranks 2 and 4 of one seed"


def test_a_held_out_loss_that_is_not_finite_is_no_row(tiny_folder, rows_file, tmp_path, monkeypatch):
    options = _run(tiny_folder, tmp_path) | {"rank": 2}
    monkeypatch.setattr("veneer.studies.trained.quality", lambda prepared: {"loss": math.nan, "accuracy": 0.5})
    with pytest.raises(DivergedError, match=r"^The held-out loss is not finite after 2 steps\.$"):
        trained(options, tmp_path / "runs")
    assert list((tmp_path / "runs").glob("*/measured.json")) == []


def test_the_held_out_loss_is_measured_once(tiny_folder, rows_file, tmp_path):
    """When the run is done; and the rows that it is measured on are those that a run of its own keeps from training."""
    options = _run(tiny_folder, tmp_path) | {"rank": 2, "steps": 3}
    folder, row = trained(options, tmp_path / "runs")
    assert "held_out_loss" not in (folder / "metrics.jsonl").read_text()
    alone = veneer.train(output=str(tmp_path / "alone"), **options)
    assert row["loss"] == pytest.approx(alone.loss_after, rel=1e-5)


def test_every_study_of_the_command_is_there():
    assert list(STUDIES) == ["learning-rate", "rank", "matrices", "methods", "storage", "budget", "spectrum"]
    assert all(study.title.endswith("?") for study in STUDIES.values())
    assert {StorageStudy, SpectrumStudy} <= set(STUDIES.values())


def test_the_command_runs_jobs_in_processes_of_their_own(tiny_folder, rows_file, tmp_path, veneer_command):
    done = veneer_command(
        "study", "rank", "--model", tiny_folder, "--data", rows_file, "--output", tmp_path / "rank", "--seeds", "0",
        "--ranks", "1", "--steps", 2, "--held-out", 16,
    )  # fmt: skip
    assert done.code == 0, done
    assert done.out.startswith(
        f"rank: 1 run to do; {tmp_path / 'rank'} has 0 rows\nrank: trained, rank 1, seed 0: loss "
    )
    (row,) = read_study_rows(tmp_path / "rank", RankStudy)
    assert row["peak_memory"] > 100e6


def test_a_study_over_ray(tiny_folder, rows_file, tmp_path, veneer_command):
    pytest.importorskip("ray")
    done = veneer_command(
        "study", "rank", "--model", tiny_folder, "--data", rows_file, "--output", tmp_path / "rank", "--seeds", "0,1",
        "--ranks", "1", "--steps", 2, "--held-out", 16, "--ray", "local",
    )  # fmt: skip
    assert done.code == 0, done
    assert sorted(row["seed"] for row in read_study_rows(tmp_path / "rank", RankStudy)) == [0, 1]


def test_a_cluster_that_does_not_answer_is_one_sentence(tiny_folder, rows_file, tmp_path, veneer_command):
    pytest.importorskip("ray")
    done = veneer_command(
        "study", "rank", "--model", tiny_folder, "--data", rows_file, "--output", tmp_path / "rank", "--ray", "nowhere"
    )
    assert done.code == 1
    assert done.err.startswith("Error: No Ray cluster answers at 'nowhere'")
