"""The terms of a plan are what their formulas say, add up, and change with the options as they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
import veneer
from veneer import host_memory
from veneer.commands import plan as verb
from veneer.data.labels import Tokens
from veneer.errors import ConfigError, ModelError
from veneer.kernels import heap
from veneer.planning import machine as machines
from veneer.planning import sizes as planned_sizes
from veneer.planning.config import ASKED, PlanOptions
from veneer.planning.empty import Base, base_of, empty_model, no_values
from veneer.planning.fit import predicted
from veneer.planning.ledger import KINDS, SHORT, Ledger, Operation, Stretch
from veneer.planning.machine import Machine
from veneer.planning.plan import _time, limit_of, optimizer_states, plan
from veneer.planning.sizes import WAYS, _plan
from veneer.planning.step import Step, Weights
from veneer.runs.measure import tokenizer_of, words
from veneer.training import packing
from veneer.training.config import TrainConfig
from veneer.training.loss import How
from veneer.units import amount

pytestmark = pytest.mark.unit

RATES = {kind: 1e11 if kind in ("products", "attention") else 1e10 for kind in KINDS}
MACHINE = Machine(RATES, operation=1e-6, runtime=400 * 10**6, loading=390 * 10**6)


@pytest.fixture
def config_alone(tiny_folder, tmp_path):
    """A model folder without weights and without a tokenizer."""
    shutil.copy(tiny_folder / "config.json", tmp_path)
    return str(tmp_path)


def _plan_of(model, **options):
    return plan(PlanOptions(model=model, **{"batch_size": 4, "max_length": 32, **options}), MACHINE)


def test_terms_add_up_and_no_weight_is_read(config_alone, tiny_folder):
    made = _plan_of(config_alone)
    assert made.training == sum(made.terms.values())
    assert made.peak == max(made.training, made.loading)
    model, _ = veneer.load(tiny_folder)
    assert made.terms["base, dense"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    veneer.attach(model, veneer.LoRA())
    count = veneer.trainable(model).parameters
    assert made.parameters == count
    assert made.terms["trained weights"] == 4 * count
    assert made.terms["optimizer states"] == 8 * count


@pytest.mark.parametrize("storage", ["nf4", "int8", "bf16"])
def test_a_base_takes_what_it_takes_when_it_is_loaded(storage, config_alone, tiny_folder):
    made = _plan_of(config_alone, storage=storage)
    model, _ = veneer.load(tiny_folder, storage=storage)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert sum(size for name, size in made.terms.items() if name.startswith("base")) == held


def test_the_pages_of_a_file_in_another_type_are_told_but_not_needed(config_alone, tiny_folder):
    """16-bit weights are read into 32 bits a tensor at a time; the system can drop the pages that have been read."""
    file = Path(config_alone, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    model, _ = veneer.load(tiny_folder)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    config = PlanOptions(model=config_alone, batch_size=1, max_length=2)
    made = plan(config, replace(MACHINE, loading=10**9))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert made.peak == made.loading == pytest.approx(10**9 + 6 * numbers + buffers, abs=2 * buffers)
    assert made.needed == pytest.approx(10**9 + 4 * numbers + 2 * largest + buffers, abs=2 * buffers)
    full = plan(PlanOptions(**{**config.changed(), "method": "full"}), MACHINE)
    assert full.needed == full.peak, "of a model that is trained no page is the file's"


def test_planning_installs_no_heap_and_asks_whether_there_is_one(config_alone, monkeypatch):
    monkeypatch.setattr(heap, "settled", lambda: True)
    monkeypatch.setattr(heap, "use_heap", lambda: pytest.fail("it was installed"))
    for installed in (False, True):
        monkeypatch.setattr(heap, "installed", lambda installed=installed: installed)
        assert ("heap's holes" in _plan_of(config_alone).terms) is not installed


def test_states_of_the_optimizer():
    def states(**options):
        return optimizer_states(TrainConfig(model="m", data="d", output="o", **options), 10**6)

    assert states() == 8 * 10**6
    assert states(optimizer="paged-adamw", optimizer_memory="2MB") == 2 * 10**6
    assert states(optimizer="paged-adamw") == 8 * 10**6, "all of it is in memory"
    assert states(optimizer="paged-adamw", optimizer_bits=8) == 2 * 10**6 + 2 * 4 * 10**6 // 256


def test_the_options_that_save_memory_do(config_alone):
    size = {"batch_size": 16, "max_length": 128}
    plain = _plan_of(config_alone, **size)
    for options in ({"micro_batch_size": 8}, {"gradient_checkpointing": True}, {"max_length": 64}):
        assert _plan_of(config_alone, **{**size, **options}).training < plain.training, options
    assert _plan_of(config_alone, method="adalora").terms["importance"] > 0
    full = _plan_of(config_alone, method="full")
    assert full.terms["optimizer states"] == 2 * full.terms["trained weights"] == 8 * full.parameters


def test_a_schedule_longer_than_a_hundred_steps(config_alone):
    long = {"method": "adalora", "tinit": 200, "tfinal": 500}
    assert _plan_of(config_alone, **long).terms == _plan_of(config_alone, **long, steps=5000).terms
    with pytest.raises(ConfigError, match="leave none of the 600 steps"):
        _plan_of(config_alone, **long, steps=600)


def test_recomputing_takes_more_time_and_products_most_of_it(config_alone):
    plain, again = _plan_of(config_alone), _plan_of(config_alone, gradient_checkpointing=True)
    assert again.step_seconds > plain.step_seconds > 0
    assert sum(plain.shares.values()) == pytest.approx(plain.step_seconds)
    twice = _plan_of(config_alone, batch_size=8, micro_batch_size=4)
    assert twice.step_seconds == pytest.approx(2 * plain.step_seconds, rel=0.02)


def test_the_largest_pass_of_an_encoder_decoder_may_be_that_of_the_longest_answer():
    base = Base("t5", tiny.build("t5").config, "seq2seq", "fp32", 64, True, torch.float32)
    question, answer = Tokens([1] * 9, [1] * 2, ""), Tokens([1] * 5, [1] * 30, "")
    options = PlanOptions(model="t5", batch_size=2, micro_batch_size=1)
    of_both, of_answers = (
        plan(options, MACHINE, base=base, rows=rows, how=How(False, False))
        for rows in ([question, answer], [answer, answer])
    )
    assert of_both.terms == of_answers.terms
    assert of_both.shares["products"] == pytest.approx(of_answers.shares["products"] * (11 + 35) / (35 + 35))


def test_memory_is_kept_to_by_the_fewest_layers(config_alone):
    config = PlanOptions(model=config_alone, batch_size=4, max_length=64)
    none, all_ = (plan(config, MACHINE, recomputed=count) for count in (0, 2))
    between = plan(config, MACHINE, recomputed=1)
    assert none.peak > between.peak > all_.peak
    asked = PlanOptions(**{**config.changed(), "memory": f"{between.needed}B"})
    made = predicted(asked, MACHINE, between.needed)
    assert (made.recomputed, made.peak) == (1, between.peak)
    assert none.mapped > 0
    assert predicted(asked, MACHINE, none.needed).recomputed == 0, "pages of the base's file need not fit"
    assert predicted(asked, MACHINE, 1).recomputed == 2, "nothing fits: the one that takes least"


@pytest.mark.parametrize("kind", [KeyError, AttributeError, NameError, TypeError])
def test_a_fault_of_ours_is_no_model_that_cannot_be_planned(config_alone, monkeypatch, kind):
    def fault(*_, **__):
        raise kind("a fault of ours")

    monkeypatch.setattr("veneer.planning.fit.plan", fault)
    with pytest.raises(kind, match="a fault of ours"):
        predicted(PlanOptions(model=config_alone), MACHINE, 10**9)


def test_models_are_found_by_all_their_names(config_alone):
    assert base_of(config_alone, "fp32", 64, True).kind == "causal"
    with pytest.raises(ModelError, match="There is no model at"):
        base_of(config_alone + "/none", "fp32", 64, True)


def test_on_a_gpu_no_page_of_the_base_is_a_files(config_alone):
    made = _plan_of(config_alone, device="cuda")
    assert made.needed == made.peak


def test_no_fake_value_is_left_behind(config_alone):
    _plan_of(config_alone, storage="nf4")
    model = no_values(lambda: empty_model(base_of(config_alone, "nf4", 64, True)))
    assert type(model.model.embed_tokens.weight.data).__name__ == "FakeTensor"
    weight = torch.randn(64, 64)
    from veneer.frozen.blockwise import dense, quantise

    assert torch.isfinite(dense(quantise(weight))).all()


@pytest.mark.parametrize(("way", "least", "most"), [("full, 16 bits", 780e9, 800e9), ("QLoRA", 30e9, 48e9)])
def test_the_guides_claims_of_65_billion_parameters(way, least, most):
    """More than 780 GB for full fine-tuning in 16 bits, one GPU of 48 GB for QLoRA (arXiv:2305.14314, abstract)."""
    made = _plan("65B", WAYS[way], 8)
    assert least < made.peak < most
    assert made.layers == 80


@pytest.fixture
def as_measured(monkeypatch):
    """A plan in a process of its own, where the machine is measured already."""
    monkeypatch.setattr(verb, "remembered", lambda: MACHINE)
    monkeypatch.setattr(verb.Process, "now", lambda: None)


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(machines.HostLoad, "disturbs", lambda _, cores: False)


@pytest.fixture
def not_measured(monkeypatch):
    monkeypatch.setattr(verb, "remembered", lambda: None)
    monkeypatch.setattr(verb, "measured", lambda **_: pytest.fail("the machine was measured"))


@pytest.mark.usefixtures("not_measured")
def test_a_machine_is_not_measured_for_a_mistake_nor_for_a_gpu(config_alone, refused, veneer_command, monkeypatch):
    assert "There is no model at" in refused("plan", f"{config_alone}/typo")
    assert "'q_porj', which matches no module" in refused("plan", config_alone, "--targets", "q_porj")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU here" in refused("plan", config_alone, "--device", "cuda")
    done = veneer_command("plan", config_alone, "--device", "cuda", "--memory", "24GB", "--batch-size", "2")
    assert "It fits" in done.out, done.err


def test_a_machine_is_measured_when_all_else_is_in_order(config_alone, monkeypatch):
    monkeypatch.setattr(verb, "remembered", lambda: None)
    monkeypatch.setattr(verb, "measured", lambda **_: MACHINE)
    made = verb.answer(PlanOptions(model=config_alone, batch_size=2, max_length=16)).plan
    assert made.terms["runtime"] == MACHINE.runtime
    assert made.step_seconds > 0


def test_without_a_model_the_rank_counts_and_no_other_flag_is_taken(refused, veneer_command, monkeypatch):
    said = refused("plan", "--rank", "64", "--memory", "24GB", "--batch-size", "2")
    assert "to which --memory, --batch-size do nothing" in said
    assert "to which --dropout does nothing" in refused("plan", "--dropout", "0.1")
    assert "rank = 'many' is not valid" in refused("plan", "--rank", "many")
    monkeypatch.setattr(planned_sizes, "SIZES", {"7B": planned_sizes.SIZES["7B"]})
    told = json.loads(veneer_command("plan", "--rank", "64", "--json").out)
    assert told["rank"] == 64
    in_and_out = 4 * (4096 + 4096) + 3 * (4096 + 11008)  # of the matrices of a layer
    assert told["models"]["7B"]["QLoRA"]["parameters"] == 64 * 32 * in_and_out


@pytest.mark.usefixtures("as_measured")
@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
def test_the_type_of_computing_is_known(config_alone, veneer_command, storage):
    made = {name: _plan_of(config_alone, storage=storage, compute=name) for name in ("auto", "fp32", "bf16")}
    assert made["auto"] == made["fp32"]
    assert (made["fp32"].compute, made["bf16"].compute) == ("fp32", "bf16")
    kept = [made[name].terms["saved activations"] for name in ("fp32", "bf16")]
    assert kept[1] < 0.7 * kept[0]
    for name, said in (("fp32", False), ("bf16", True)):
        told = veneer_command("plan", config_alone, "--storage", storage, "--compute", name)
        assert ("Activations and products are in bf16." in told.out) is said


@pytest.mark.usefixtures("as_measured")
def test_the_verb_tells_a_person_and_a_program(config_alone, veneer_command):
    done = veneer_command("plan", config_alone, "--batch-size", "4", "--max-length", "32", "--steps", "10")
    assert done.code == 0, done.err
    for said in ("saved activations", "peak of training", "It fits", "tokens/s", "The run of 10 steps"):
        assert said in done.out
    told = json.loads(veneer_command("plan", config_alone, "--batch-size", "4", "--max-length", "32", "--json").out)
    assert told["fits"]
    assert told["peak"] == sum(told["terms"].values())


@pytest.mark.usefixtures("as_measured")
def test_what_does_not_fit_comes_with_changes_that_do(config_alone, veneer_command):
    asked = ("plan", config_alone, "--batch-size", "16", "--max-length", "128", "--memory", "402MB")
    told = json.loads(veneer_command(*asked, "--json").out)
    assert not told["fits"]
    assert told["changes"]
    said = " ".join(veneer_command(*asked).out.split())
    assert f"It does not fit: {amount(told['needed'])} of 402.0 MB. " in said
    assert "What would fit:" in said
    for change in told["changes"]:
        assert change["needed"] <= told["limit"]
        assert change["needed"] < change["peak"], "the base of this file is mapped"
        assert f"→ {amount(change['needed'])}: {change['cost']}" in said
        assert "the same result" in change["cost"]


@pytest.mark.usefixtures("as_measured")
def test_what_fits_is_never_said_to_take_more_than_the_limit(config_alone, veneer_command):
    """The peak includes pages of the base's file, which the system drops: what is needed fits, and is printed."""
    asked = ("plan", config_alone, "--batch-size", "4", "--max-length", "32")
    plan_ = json.loads(veneer_command(*asked, "--json").out)
    assert plan_["needed"] < plan_["peak"]
    memory = (plan_["needed"] + plan_["peak"]) // 2
    lines = veneer_command(*asked, "--memory", f"{memory}B").out.splitlines()
    assert f"It fits: {amount(plan_['needed'])} of {amount(memory)}." in lines
    assert any(line.startswith(f"The other {amount(plan_['peak'] - plan_['needed'])} of the peak") for line in lines)
    within = veneer_command(*asked, "--memory", f"{plan_['peak']}B").out
    assert f"It fits: {amount(plan_['peak'])} of {amount(plan_['peak'])}." in within
    assert "The other" not in within


@pytest.mark.usefixtures("as_measured")
def test_a_plan_is_asked_for_in_python_as_on_the_command_line(config_alone, veneer_command):
    answer = verb.plan(Path(config_alone), batch_size=4, max_length=32, memory="2GB")
    asked = ("plan", config_alone, "--batch-size", "4", "--max-length", "32", "--memory", "2GB", "--json")
    assert answer.as_json() == json.loads(veneer_command(*asked).out)
    assert repr(answer).startswith(f"Answer(Plan({config_alone!r}: peak {amount(answer.plan.peak)}, ")
    assert repr(answer).endswith(". It fits: " + f"{amount(answer.plan.peak)} of 2.00 GB.)")
    assert len(repr(answer.plan)) < len(config_alone) + 100
    html = replace(answer.plan, model="<b>")._repr_html_()
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert amount(answer.plan.terms["base, dense"]) in html
    assert "It fits" in answer._repr_html_()


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (3, {}, "plan takes a model's name or path (str or pathlib.Path), not the int 3."),
        (None, {}, "plan takes a model's name or path (str or pathlib.Path), not None."),
        ("m", {"ranks": 3}, "PlanOptions has no option 'ranks'. Did you mean 'rank'?"),
        ("m", {"batch_size": "many"}, "batch_size = 'many' is not valid"),
        ("./none/there", {}, "There is no model at"),
    ],
)
def test_a_wrong_type_or_value_is_one_sentence(model, options, said):
    with pytest.raises(veneer.VeneerError) as refused:
        verb.plan(model, **options)
    assert said in str(refused.value)


@pytest.mark.usefixtures("as_measured")
def test_an_encoder_is_planned_as_the_classifier_that_train_makes_of_it(tiny_encoder, veneer_command):
    asked = ("plan", tiny_encoder, "--batch-size", "16", "--max-length", "128", "--memory", "402MB", "--json")
    told = json.loads(veneer_command(*asked).out)
    assert {"micro_batch_size"} in [set(change["options"]) for change in told["changes"]]
    model, _ = veneer.load(tiny_encoder, labels=["one", "two"])
    veneer.attach(model, veneer.LoRA())
    assert told["parameters"] == veneer.trainable(model).parameters


def test_no_other_storage_is_offered_for_a_checkpoint_with_codes():
    coded = base_of("smollm2-135m-instruct", "fp32", 64, True)._replace(storage="nf4", mapped=True)
    with pytest.raises(ModelError, match="is kept as nf4, and cannot be loaded as int8"):
        coded.kept_as("int8")


@pytest.mark.usefixtures("as_measured")
def test_what_cannot_be_planned_is_one_sentence(looking_at_values, veneer_command):
    done = veneer_command("plan", looking_at_values, "--task", "classification")
    assert done.code == 1
    assert done.err.startswith(f"Error: {looking_at_values} cannot be planned: ")
    assert done.err.count("\n") == 1


@pytest.mark.usefixtures("as_measured")
def test_a_yaml_of_a_run_is_planned_and_flags_win(config_alone, veneer_command, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {config_alone}\nmax_length: 16\nbatch_size: 2\n")
    assert json.loads(veneer_command("plan", str(file), "--json").out)["tokens"] == 32
    assert (
        json.loads(veneer_command("plan", config_alone, str(file), "--batch-size", "4", "--json").out)["tokens"] == 64
    )


def test_memory_that_is_no_size_and_a_gpu_that_is_not_there(config_alone, veneer_command):
    assert "memory = 'much' is not a size" in veneer_command("plan", config_alone, "--memory", "much").err
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU here"):
            limit_of(PlanOptions(model="m", device="cuda"), 0)


def test_every_flag_is_an_option():
    assert set(ASKED) <= set(PlanOptions.model_fields)


def test_the_control_group_bounds_the_memory(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert host_memory._left(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory._left(tmp_path) > 2**60
    assert 0 < host_memory.usable_host_memory() < 2**60


@pytest.mark.parametrize(
    ("limit", "used", "stat"),
    [
        ("memory.max", "memory.current", "anon 300\ninactive_file 100\nactive_file 200\nslab 10\n"),
        (
            "memory.limit_in_bytes", "memory.usage_in_bytes",
            "cache 7\ninactive_file 3\nactive_file 4\ntotal_inactive_file 100\ntotal_active_file 200\n",
        ),
    ],
)  # fmt: skip
def test_of_a_control_group_the_pages_of_files_are_available(limit, used, stat, tmp_path, monkeypatch):
    """In a group of 1000 a process has 300 and 200 of a mapped file; 100 more are of files that were read."""
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / used).write_text("600\n")
    assert host_memory._left(tmp_path) == 400, "a group that does not tell"
    (tmp_path / "memory.stat").write_text(stat)
    assert host_memory._left(tmp_path) == 700
    monkeypatch.setattr(host_memory, "control_groups", lambda _: [tmp_path / "none", tmp_path])
    monkeypatch.setattr(host_memory, "_available", lambda: 10**6)
    monkeypatch.setattr(host_memory, "resident_memory", lambda: 500)
    monkeypatch.setattr(host_memory, "file_memory", lambda: 200)
    assert host_memory.usable_host_memory() == 1000


def test_a_tokenizer_of_more_words_than_the_measured_one_takes_more():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

    def made(words):
        base = Base("a", LlamaConfig(**sizes, vocab_size=words), "causal", "fp32", 64, True, torch.float32)
        return plan(PlanOptions(model="a", batch_size=1, max_length=8), MACHINE, base=base)

    few, measured, more = (made(words) for words in (1000, 49152, 99152))
    assert few.terms["runtime"] == measured.terms["runtime"] == MACHINE.runtime
    assert more.terms["runtime"] - MACHINE.runtime == 50_000 * 900
    embedding = 4 * 64 * 50_000  # and the head, tied to no other
    assert more.loading - measured.loading == 3 * embedding, "the largest tensor is there twice, the tokenizer not yet"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """This machine, measured in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        measured = machines._measure()
    if not measured.rates:
        pytest.skip("the machine is too busy to be measured")
    return measured


def test_a_machine_is_measured(found, monkeypatch):
    assert set(KINDS) <= set(found.rates) <= {*KINDS, *(f"{kind}{SHORT}" for kind in KINDS)}
    assert min(found.rates.values()) > 10**7
    assert 0 <= found.operation < 0.01  # 0 where the noise is larger
    assert 10**8 < found.loading <= found.runtime < 10**9
    monkeypatch.setattr(machines.sys, "executable", "/bin/false")
    with pytest.raises(ModelError, match="rates could not be measured"):
        machines._measure()


_LOADED = """
import sys
from veneer.threads import settle
settle()
from veneer.training.config import TrainConfig
import veneer.runs.memory  # as the command does
from veneer.host_memory import peak_host_memory
from veneer.runs.prepare import prepare
prepare(TrainConfig(model=sys.argv[1], storage="bf16", data=sys.argv[2], output=sys.argv[3], held_out=0))
print(peak_host_memory())
"""


def test_on_the_measured_machine_the_peak_of_loading_in_another_type_is_foreseen(found, tmp_path):
    """All of the file is beside the weights made of it; making the measured model does not count as loading it."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=49152, tie_word_embeddings=True)).save_pretrained(tmp_path)
    known = words(49152)
    tokenizer_of(known).save_pretrained(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": " ".join(known[1:9])}) + "\n")
    command = [sys.executable, "-c", _LOADED, tmp_path, rows, tmp_path / "run"]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    made = plan(PlanOptions(model=str(tmp_path), storage="bf16", batch_size=1, max_length=8), found)
    assert made.loading == made.peak == pytest.approx(peak, rel=0.03)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("more", [{}, {f"products{SHORT}": 3e11}])
def test_the_machine_is_measured_once(more, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = replace(MACHINE, rates=RATES | more)
    calls = []
    monkeypatch.setattr(machines, "_measure", lambda: calls.append(1) or found)
    assert machines.remembered() is None
    assert machines.measured() == machines.measured() == found
    assert machines.remembered() == found
    assert len(calls) == 1
    (tmp_path / "veneer" / "machine.json").write_text("damaged")
    assert machines.measured() == found


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("upgraded", ["veneer", "transformers"])
def test_with_another_version_it_is_measured_again(upgraded, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machines, "_measure", lambda: MACHINE)
    assert machines.measured() == machines.remembered() == MACHINE
    before = metadata.version
    monkeypatch.setattr(machines, "version", lambda name: "99" if name == upgraded else before(name))
    assert machines.remembered() is None


def test_an_operation_is_one_in_16_bits_where_any_of_its_numbers_is():
    x = torch.ones(4, 4)
    ledger = Ledger([x])
    with ledger:
        ledger.begin("forward")
        torch.mm(x, x)
        torch.exp(x)
        short = x.bfloat16()
        torch.mm(short, short)
        torch.exp(short)
        short.float()
    kinds = [operation.kind for operation in ledger.stretches[0].operations]
    assert kinds == [
        "products", "functions", f"passes{SHORT}", f"products{SHORT}", f"functions{SHORT}", f"passes{SHORT}",
    ]  # fmt: skip


@pytest.mark.parametrize("at_once", [False, True])
def test_attention_costs_the_squares_of_the_rows_however_it_is_called(at_once, monkeypatch):
    """Two products forward and five backward, half of each, of 16² + 2 · 8² scores by 2 heads of 16."""
    monkeypatch.setattr(packing, "_at_once", lambda query, value: at_once)
    q = torch.randn(1, 2, 32, 16).bfloat16().requires_grad_()
    ledger = Ledger([q])
    with ledger:
        ledger.begin("both")
        y, _ = packing.attention_by_rows(torch.nn.Module(), q, q, q, None, row_lengths=(16, 8, 8))
        y.sum().backward()
    costs = [operation for operation in ledger.stretches[0].operations if operation.kind == f"attention{SHORT}"]
    assert sum(operation.flops for operation in costs) == (2 + 5) * (16**2 + 2 * 8**2) * 2 * 16
    assert len(costs) == (2 if at_once else 4)


@pytest.mark.parametrize(("kind", "flops", "moved"), [("products", 1e11, 1.0), ("functions", 0.0, 1e10)])
def test_operations_in_16_bits_take_their_own_rate_and_without_one_fp32s(kind, flops, moved):
    step = Step(Weights(*[0] * 10), 0, [Stretch("forward", operations=[Operation(f"{kind}{SHORT}", flops, moved)])])
    fp32 = (flops or moved) / RATES[kind]
    for more, seconds in (({}, fp32), ({f"{kind}{SHORT}": 4 * RATES[kind]}, fp32 / 4)):
        found = sum(_time(step, 1, replace(MACHINE, rates=RATES | more, operation=0.0)).values())
        assert found == pytest.approx(seconds)


@pytest.mark.usefixtures("as_measured")
@pytest.mark.parametrize("less", [0, 1, 4_000, 60_000])
def test_fitting_is_never_printed_beside_a_larger_number_nor_the_opposite_beside_the_same(less, config_alone):
    size = {"batch_size": 8, "max_length": 64}
    needed = verb.plan(config_alone, **size, memory="8GB").plan.needed
    answer = verb.plan(config_alone, **size, memory=needed - less, gradient_checkpointing=False)
    said = re.fullmatch(r"It (fits|does not fit): ([\d,.]+) .B of ([\d,.]+) .B\.", answer.lines()[0])
    verdict, one, other = said.groups()
    printed, limit = (float(number.replace(",", "")) for number in (one, other))
    assert (verdict == "fits") == (printed <= limit) == answer.fits
    for change, size in zip(answer.changes, answer._sizes()[2:], strict=True):
        assert change.plan.needed <= answer.limit
        assert float(size.split()[0].replace(",", "")) <= limit
