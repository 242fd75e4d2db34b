"""The base of all options: what is refused, in which words, and what other libraries call them."""

from __future__ import annotations

import re

import pytest

import veneer
from veneer.cli import cli
from veneer.commands.config import ExportOptions, InspectOptions, MergeOptions, QuantizeOptions
from veneer.errors import ArgumentError, ConfigError, shown
from veneer.evaluation.config import EvaluateOptions
from veneer.generation.config import GenerateOptions
from veneer.options import ELSEWHERE, EXPLAINED, memory_size
from veneer.planning.config import PlanOptions
from veneer.reporting.config import ReportOptions
from veneer.studies.config import StudyOptions
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit

VERBS = [ExportOptions, InspectOptions, MergeOptions, QuantizeOptions, EvaluateOptions, GenerateOptions, PlanOptions]
VERBS += [ReportOptions, StudyOptions, TrainConfig]
RUN = {"model": "m", "data": "d", "output": "o"}


def _refusal(options, **values):
    with pytest.raises(ConfigError) as caught:
        options(**values)
    return str(caught.value)


def test_names_of_pefts_options_are_answered_with_those_used_here():
    assert _refusal(veneer.LoRA, r=8, lora_alpha=16, target_modules=["q_proj"]) == (
        "LoRA has other names for these: r is rank, lora_alpha is alpha, target_modules is targets."
    )
    assert "init_r is initial_rank, total_step is total_steps" in _refusal(veneer.AdaLoRA, init_r=12, total_step=9)
    assert "r is initial_rank." in _refusal(veneer.AdaLoRA, r=12)


def test_names_of_trls_and_mlxs_options_are_answered_too():
    said = _refusal(TrainConfig, **RUN, per_device_train_batch_size=2, num_train_epochs=3, lr=1e-4, iters=5, stepz=1)
    assert "per_device_train_batch_size is micro_batch_size or batch_size, num_train_epochs is epochs" in said
    assert "lr is learning_rate, iters is steps." in said
    assert "no option 'stepz'. Did you mean 'steps'" in said
    said = _refusal(TrainConfig, **RUN, gradient_accumulation_steps=4)
    assert (
        "gradient_accumulation_steps follows from batch_size (rows of an optimizer step) and micro_batch_size" in said
    )


def test_a_name_that_an_option_has_here_is_no_other_librarys():
    names = {name for options in VERBS for name in options.model_fields}
    assert {name for names_here in ELSEWHERE.values() for name in names_here} <= names | {"total_steps"}
    assert {own for own, _ in EXPLAINED.values()} <= names
    assert not {*ELSEWHERE, *EXPLAINED} & names
    # LoRA has no steps: what it answers then is what it has.
    assert "LoRA has no option 'iters'" in _refusal(veneer.LoRA, iters=3)


def test_an_option_without_its_name_is_one_sentence():
    with pytest.raises(ArgumentError, match=r"LoRA takes its options by name, and 8 has none: write LoRA\(rank=8\)"):
        veneer.LoRA(8)
    with pytest.raises(ArgumentError, match=re.escape("{'rank': 4} has none")):
        veneer.AdaLoRA({"rank": 4})


def test_one_item_where_a_list_is_meant_is_a_list_of_one():
    lora = veneer.LoRA(targets="q_proj", exclude="k_proj", train_also="lm_head", layers=1, new_tokens=5)
    assert (lora.targets, lora.exclude, lora.train_also) == (["q_proj"], ["k_proj"], ["lm_head"])
    assert (lora.layers, lora.new_tokens) == ([1], [5])
    more = veneer.LoRA(layers=range(2), train_also="lm_head, score", targets=("q_proj", "v_proj"), new_tokens="3,4")
    assert (more.layers, more.train_also, more.targets) == ([0, 1], ["lm_head", "score"], ["q_proj", "v_proj"])
    assert more.new_tokens == [3, 4]
    study = StudyOptions(seeds=3, ranks="8,4", rates=1e-3)
    assert (study.seeds, study.ranks, study.rates) == ([3], [4, 8], [1e-3])
    assert TrainConfig(**RUN, train_also="lm_head").train_also == ["lm_head"]
    for refused in (True, None, {"a": 1}, b"x"):
        assert "train_also" in _refusal(veneer.LoRA, train_also=refused)


@pytest.mark.parametrize("options", [TrainConfig, PlanOptions])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("12", "12 has no unit; write 12GB, 12MB or 12GiB."),
        (" 1.5 ", "1.5 has no unit; write 1.5GB, 1.5MB or 1.5GiB."),
        (12, "12 has no unit; write 12GB, 12MB or 12GiB."),  # as YAML reads it
        (1.5, "1.5 has no unit; write 1.5GB, 1.5MB or 1.5GiB."),
        ("12000000000", "12000000000 has no unit; write 12000000000B."),
    ],
)
def test_a_size_without_a_unit_is_asked_for_one(options, given, said):
    assert _refusal(options, **RUN, memory=given) == f"memory = {said}"
    assert _refusal(options, **RUN, optimizer="paged-adamw", optimizer_memory=given) == f"optimizer_memory = {said}"


def test_a_size_in_bytes_is_a_whole_number_in_python():
    config = TrainConfig(**RUN, memory=2 * 10**9)
    assert memory_size(config.memory) == 2 * 10**9
    assert TrainConfig(**config.model_dump()) == config


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_every_flag_that_is_a_size_asks_for_its_unit(verb, refused):
    flags = [p.opts[0] for p in cli.commands[verb].params if p.name.endswith("memory") and p.metavar == "TEXT"]
    assert flags == ["--optimizer-memory", "--memory"] if verb == "train" else ["--memory", "--optimizer-memory"]
    named = ["m"] if verb == "plan" else ["--model", "m", "--data", "d", "--output", "o"]
    for flag in flags:
        paged = ["--optimizer", "paged-adamw"] if flag == "--optimizer-memory" else []
        said = f"{flag[2:].replace('-', '_')} = 12 has no unit; write 12GB, 12MB or 12GiB."
        assert refused(verb, *named, *paged, flag, "12") == said


def test_a_refusal_does_not_repeat_long_input():
    rows = [{"prompt": "a" * 50, "completion": "b"}] * 5000
    for options, values in [
        (veneer.LoRA, {"rank": rows}),
        (TrainConfig, {**RUN, "memory": "x" * 5000}),
        (TrainConfig, {**RUN, "memory": "9" * 5000}),
        (TrainConfig, {**RUN, "held_out": rows}),
        (veneer.AdaLoRA, {"budget": "y" * 5000}),
        (veneer.LoRA, {"z" * 5000: 1}),
        (StudyOptions, {"seeds": [1] * 5000}),
    ]:
        assert len(_refusal(options, **values)) < 1000, options
    assert shown(rows) == shown(rows[:5])[: len(shown(rows)) - 1] + "…"
    assert shown({"rank": 4}) == "{'rank': 4}"
    assert shown("abc") == "'abc'"
