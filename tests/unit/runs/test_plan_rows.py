"""A plan with the rows is the plan that train makes of them just before its first step."""

from __future__ import annotations

import io
import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.console import Console
from transformers import AutoTokenizer

import tiny
import veneer
from veneer.commands import plan as verb
from veneer.data.labels import Tokens
from veneer.errors import DataError
from veneer.models import source
from veneer.planning.empty import Base
from veneer.planning.fit import how_by_shapes
from veneer.planning.ledger import KINDS
from veneer.planning.machine import Machine
from veneer.runs import memory as planned
from veneer.runs.folder import RunFolder
from veneer.training.automatic import rate_of
from veneer.training.loss import Loss

pytestmark = pytest.mark.unit

# Its runtime is more than this process has, so that of both plans it is the same.
MACHINE = Machine(dict.fromkeys(KINDS, 1e10), operation=1e-6, runtime=10**11, loading=10**11 - 10**7)
MEMORY = "200GB"
CONVERSATION = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "It is two." * 3}]


@pytest.fixture(autouse=True)
def as_measured(monkeypatch):
    monkeypatch.setattr(verb, "remembered", lambda: MACHINE)
    monkeypatch.setattr(planned, "remembered", lambda: MACHINE)
    monkeypatch.setattr(planned, "generous", lambda *_: float("inf"))  # train plans before its first step


def _rows(count=30):
    """Of other lengths, and none like another."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        {"prompt": letters[number % 26] * (1 + number % 17) + ":", "completion": " yes" * (1 + number % 3)}
        for number in range(count)
    ]


@pytest.fixture
def sixteen(tiny_folder, tmp_path):
    """The tiny model in 16 bits, which is read into another type."""
    model, tokenizer = veneer.load(tiny_folder)
    for part in (model.to(torch.bfloat16), tokenizer):
        part.save_pretrained(tmp_path / "sixteen")
    return tmp_path / "sixteen"


@pytest.fixture
def t5(tiny_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = tiny.build("t5")
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def _both(model, tmp_path, **options):
    """The plan that is asked for, and the one that a run of the same options writes; and how many steps it took."""
    options = {"memory": MEMORY, **options}
    asked = verb.plan(model, **options)
    run = veneer.train(
        str(model), **{"evaluate_every": 0, **options}, output=tmp_path / "run", console=Console(file=io.StringIO())
    )
    return asked, json.loads(RunFolder(run.folder).plan_file.read_text()), run


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 8},
        {"batch_size": 8, "epochs": 2, "held_out": 5, "seed": 3, "micro_batch_size": 3},
        {"batch_size": 4, "steps": 3, "storage": "nf4", "rank": 4, "held_out": 0, "max_length": 24},
        {"batch_size": 4, "epochs": 3, "method": "adalora", "target_rank": 2, "learn": "all"},
        {"batch_size": 8, "steps": 2, "method": "full", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_it_is_the_plan_that_train_makes(options, tiny_folder, tmp_path):
    asked, written, run = _both(tiny_folder, tmp_path, data=_rows(), **options)
    assert {**asked.plan.as_json(), "limit": asked.limit} == written
    assert asked.plan.steps == run.steps
    assert asked.plan.step_seconds > 0


@pytest.mark.parametrize("model", ["sixteen", "t5", "tiny_encoder"])
def test_so_it_is_for_other_models(model, request, tmp_path):
    rows = _rows()
    if model == "tiny_encoder":  # three classes
        rows = [{"text": row["prompt"], "label": row["completion"].strip()} for row in rows]
    asked, written, _ = _both(request.getfixturevalue(model), tmp_path, data=rows, batch_size=8, steps=2)
    assert {**asked.plan.as_json(), "limit": asked.limit} == written


def test_with_memory_as_many_layers_are_recomputed(tiny_folder, tmp_path):
    options = {"data": _rows(), "batch_size": 8, "steps": 2}
    none, all_ = (verb.plan(tiny_folder, **options, gradient_checkpointing=again).plan for again in (False, True))
    memory = (none.needed + all_.needed) // 2
    asked, written, _ = _both(tiny_folder, tmp_path, **options, memory=memory)
    assert asked.plan.recomputed > 0
    assert {**asked.plan.as_json(), "limit": asked.limit} == written


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_shapes_show_how_the_loss_is_computed(architecture):
    model = tiny.build(architecture)
    kinds = {"t5": "seq2seq", "bert": "classification"}
    kind = kinds.get(architecture, "causal")
    sample = Tokens([5, 6, 7, 8], [-100, 6, 7, 8], "")
    base = Base(architecture, model.config, kind, "fp32", 64, True, torch.float32)
    assert how_by_shapes(base, sample) == Loss(model, 0, sample, kind=kind).how


def test_the_template_decides_what_the_rows_are(tiny_folder):
    rows = [{"messages": CONVERSATION}] * 3 + [{"messages": [*CONVERSATION, *CONVERSATION]}]
    answer = verb.plan(tiny_folder, data=rows, held_out=0, batch_size=4)
    tokens = answer.rows.steps.rows
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False).rstrip()
    assert len(tokens[0].ids) == len(tokenizer(text, add_special_tokens=False).input_ids)
    assert answer.plan.tokens == sum(len(row.ids) for row in tokens)


def test_what_is_printed_of_the_rows(tiny_folder, tmp_path, veneer_command):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({**row, "source": "a"}) + "\n" for row in _rows()))
    asked = (
        "plan",
        tiny_folder,
        "--data",
        file,
        "--batch-size",
        "4",
        "--held-out",
        "6",
        "--max-length",
        "20",
        "--epochs",
        "1",
    )
    done = veneer_command(*asked)
    lines = done.out.splitlines()
    assert done.code == 0, done.err
    assert "24 rows to train on, 6 held out; 6 steps of 4." in lines
    (chosen,) = (line for line in lines if line.startswith("Chosen by auto: "))
    assert chosen == f"Chosen by auto: learning_rate {rate_of('lora', 32, 6):g}."
    assert "Columns not used (prompt/completion rows): source." in lines
    assert any("longer than max_length = 20 tokens: cut at the end." in line for line in lines)
    assert any(line.startswith("The largest step, of ") for line in lines)
    assert any(line.startswith("The run of 6 steps: ") for line in lines)
    assert "assumed" not in done.out
    told = json.loads(veneer_command(*asked, "--json").out)
    assert (told["rows"]["train"], told["rows"]["held_out"]) == (24, 6)
    assert told["rows"]["longest"] == 20
    assert told["rows"]["cut"] > 0
    assert told["steps"] == 6
    assert told["chosen"].keys() == {"learning_rate", "evaluate_every", "patience"}


def test_what_auto_chose_is_what_train_prints(tiny_folder, tmp_path):
    rows, options, said = _rows(), {"batch_size": 8, "held_out": 6, "memory": MEMORY}, io.StringIO()
    asked = verb.plan(tiny_folder, data=rows, **options)
    console = Console(file=said, width=200)
    run = veneer.train(str(tiny_folder), data=rows, output=tmp_path / "run", console=console, **options)
    (chosen,) = (line for line in asked.lines() if line.startswith("Chosen by auto: learning_rate "))
    assert "epochs 5, evaluate_every " in chosen
    assert chosen in said.getvalue().splitlines()
    told = RunFolder(run.folder).chosen()
    assert told.pop("compute") == asked.plan.compute
    assert told == asked.as_json()["chosen"]


def test_the_run_takes_the_sum_of_its_steps(tiny_folder):
    """Most steps are shorter than the largest one, whose time is the plan's."""
    rows = [{"prompt": "a:", "completion": " b"}] * 28 + [{"prompt": "ab" * 30, "completion": " b"}] * 4
    asked = verb.plan(tiny_folder, data=rows, held_out=0, batch_size=4, epochs=1)
    steps = asked.rows.steps
    tokens = sum(len(row.ids) for row in steps.rows)
    assert asked.run_seconds == pytest.approx(asked.plan.step_seconds * tokens / asked.plan.tokens)
    assert asked.run_seconds < asked.plan.steps * asked.plan.step_seconds / 4


def test_without_rows_the_assumption_is_printed(tiny_folder, veneer_command):
    """The model has 128 positions: no row of it is longer."""
    said = "Each row is assumed to have {} tokens; give --data ROWS for a plan with your own."
    lines = veneer_command("plan", tiny_folder, "--batch-size", "2").out.splitlines()
    assert said.format(128) in lines
    done = veneer_command("plan", tiny_folder, "--batch-size", "2", "--max-length", "16")
    assert said.format(16) in done.out.splitlines()
    told = json.loads(veneer_command("plan", tiny_folder, "--batch-size", "2", "--json").out)
    assert (told["rows"], told["chosen"]) == (None, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {},
            "learning_rate, epochs, evaluate_every and patience are auto: train chooses them by the method, the "
            "model's width and the number of rows.",
        ),
        (
            {"learning_rate": 1e-3, "epochs": 2, "patience": 0},
            "",
        ),
        (
            {"epochs": 2, "patience": 0},
            "learning_rate is auto: train chooses it by the method, the model's width and the number of rows.",
        ),
        ({"steps": 160}, f"Chosen by auto: learning_rate {rate_of('lora', 32, 160):g}."),
        ({"steps": 160, "learning_rate": 1e-3}, ""),
    ],
)
def test_without_rows_a_plan_says_what_auto_will_look_at(tiny_folder, options, said):
    lines = verb.plan(tiny_folder, batch_size=2, **options).lines()
    assert [line for line in lines if "auto" in line] == ([said] if said else [])


def test_the_rows_of_a_yaml_are_used_and_a_flag_wins(tiny_folder, rows_file, tmp_path, veneer_command):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tiny_folder}\ndata: {rows_file}\nheld_out: 8\nbatch_size: 8\nepochs: 2\noutput: runs/x\n")
    told = json.loads(veneer_command("plan", file, "--json").out)
    assert told["rows"]["train"] == 40
    assert told["steps"] == 10
    more = json.loads(veneer_command("plan", file, "--held-out", "16", "--epochs", "1", "--json").out)
    assert (more["rows"]["train"], more["steps"]) == (32, 4)


def test_rows_that_cannot_be_used_are_one_sentence(tiny_folder, tmp_path, refused):
    rows = tmp_path / "rows.jsonl"
    said = refused("plan", tiny_folder, "--data", tmp_path / "none.jsonl")
    assert str(tmp_path / "none.jsonl") in said
    rows.write_text('{"prompt": "a", "completion": "b"}\n{damaged\n')
    assert "rows.jsonl" in refused("plan", tiny_folder, "--data", rows)
    rows.write_text('{"prompt": "aaaaaaaaaaaa", "completion": "b"}\n' * 4)
    said = refused("plan", tiny_folder, "--data", rows, "--max-length", "4", "--held-out", "0")
    assert said.startswith("None of the 4 rows has a token to learn within max_length = 4;")
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tiny_folder}\ndata: {tmp_path / 'gone.jsonl'}\n")
    assert "gone.jsonl" in refused("plan", file)
    with pytest.raises(DataError, match="data is a set"):
        verb.plan(tiny_folder, data={1, 2})


def test_neither_weights_are_read_nor_a_random_state_is_changed(tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    before = torch.get_rng_state()
    assert verb.plan(tmp_path, data=_rows(), batch_size=8).plan.tokens > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_from_the_hub_only_config_and_tokenizer_are_fetched(tiny_folder, tmp_path, monkeypatch):
    cache, fetched = tmp_path / "snapshot", []
    cache.mkdir()

    def fetch(name, allow_patterns, local_files_only=False, revision=None):
        if local_files_only and not any(cache.iterdir()):
            raise LocalEntryNotFoundError("not here")
        if not local_files_only:
            fetched.append(allow_patterns)
            for file in tiny_folder.iterdir():
                if any(file.match(pattern) for pattern in allow_patterns):
                    shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(source, "hub_unreachable", lambda: "")
    assert verb.plan("somebody/tiny", data=_rows(), batch_size=8).plan.tokens > 0
    assert fetched[0] == ["config.json"]
    assert len(fetched) == 2
    assert not list(cache.glob("*.safetensors"))


def test_in_a_process_that_holds_more_the_runtime_is_what_it_has(tiny_folder, monkeypatch, veneer_command):
    small = Machine(MACHINE.rates, 1e-6, 10**6, 10**6)
    monkeypatch.setattr(verb, "remembered", lambda: small)
    held = verb.plan(tiny_folder, batch_size=2, max_length=16).plan.terms["runtime"]
    assert held > 10**8
    told = json.loads(veneer_command("plan", tiny_folder, "--batch-size", "2", "--max-length", "16", "--json").out)
    assert told["terms"]["runtime"] == 10**6, "the command plans for a process of its own"
