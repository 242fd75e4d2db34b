"""Loops of others: transformers' Trainer, trl's SFTTrainer and accelerate save, resume and pick the best adapter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file

import tiny
import veneer
from tokens import tokenizer
from veneer.errors import AdapterFileError, TrainingError

pytestmark = pytest.mark.interop

STEPS, EVERY = 8, 2  # AdaLoRA's ranks are fixed in step 5
KINDS = ("lora", "adalora")


def attached(kind, seed=0, model=None, **options):
    """A tiny model with an adapter of random initial values that depend on the seed; dropout is on."""
    lora = {"rank": 4, "dropout": 0.1, "new_tokens": [3], "train_also": ["lm_head"]}
    adalora = {"initial_rank": 4, "target_rank": 1, "total_steps": STEPS, "tinit": 1, "tfinal": 3, "dropout": 0.1}
    config = veneer.LoRA(**{**lora, **options}) if kind == "lora" else veneer.AdaLoRA(**{**adalora, **options})
    model = tiny.build("llama") if model is None else model
    torch.manual_seed(seed)
    return veneer.attach(model, config)


def rows(count=16):
    return [{name: value[0] for name, value in tiny.batch("llama", rows=1, seed=seed).items()} for seed in range(count)]


def trainer(model, folder, kind=tf.Trainer, callbacks=(), **options):
    arguments = tf.TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=0.02,
        disable_tqdm=True, logging_steps=1000, save_steps=EVERY, **options,
    )  # fmt: skip
    return kind(model, arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks))


def same_files(one: Path, other: Path) -> bool:
    names = ("adapter_model.safetensors", "adapter_config.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


class Killed(tf.TrainerCallback):
    """Ends the process, as the system does, in the middle of a step between two checkpoints."""

    def on_pre_optimizer_step(self, args, state, control, **more):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Kind → the folder of an uninterrupted run, with its checkpoints and what it ends with."""
    folder = tmp_path_factory.mktemp("unbroken")
    for kind in KINDS:
        run = trainer(attached(kind), folder / kind)
        run.train()
        run.save_model(str(folder / kind / "end"))
    return folder


def test_a_killed_run_resumes_to_the_same_bytes(unbroken, tmp_path):
    processes = {}
    for kind in KINDS:
        code = (
            f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
            f"from test_trainer import *\n"
            f"trainer(attached({kind!r}), {str(tmp_path / kind)!r}, callbacks=[Killed()]).train()"
        )
        processes[kind] = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    for kind, process in processes.items():
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
        assert {path.name for path in (tmp_path / kind).iterdir()} == {"checkpoint-2", "checkpoint-4"}
        run = trainer(attached(kind, seed=1), tmp_path / kind)
        run.train(resume_from_checkpoint=True)
        run.save_model(str(tmp_path / kind / "end"))
        assert same_files(tmp_path / kind / "end", unbroken / kind / "end")


@pytest.mark.parametrize("step", [2, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_before_and_after_the_ranks_are_fixed(kind, step, unbroken, tmp_path):
    model = attached(kind, seed=1)
    run = trainer(model, tmp_path)
    run.train(resume_from_checkpoint=str(unbroken / kind / f"checkpoint-{step}"))
    run.save_model(str(tmp_path / "end"))
    assert same_files(tmp_path / "end", unbroken / kind / "end")
    if kind == "adalora":
        assert veneer.allocator(model).step == STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_at_the_end(kind, tmp_path):
    """The best is the first, so AdaLoRA goes back from its final ranks to those in training."""

    class WorseAndWorse(tf.Trainer):
        def _determine_best_metric(self, metrics, trial):
            return super()._determine_best_metric({"eval_worse": float(self.state.global_step)}, trial)

    model = attached(kind)
    best = {"metric_for_best_model": "worse", "greater_is_better": False, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, WorseAndWorse, eval_strategy="steps", eval_steps=EVERY, **best)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    run.save_model(str(tmp_path / "end"))
    assert same_files(tmp_path / "end", tmp_path / "checkpoint-2")
    assert not same_files(tmp_path / "end", tmp_path / "checkpoint-8")
    if kind == "adalora":
        assert (veneer.allocator(model).step, veneer.allocator(model).fixed) == (2, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_an_adapter_to_veneer_and_peft(kind, unbroken, tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    checkpoint = unbroken / kind / "checkpoint-6"
    model = tiny.build("llama")
    veneer.load_adapter(model, checkpoint)
    if kind == "adalora":  # peft cannot load a matrix of rank 0
        veneer.export(checkpoint, tmp_path / "plain")
        checkpoint = tmp_path / "plain"
    theirs = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(checkpoint))
    batch = tiny.batch("llama")
    torch.testing.assert_close(tiny.logits(theirs.eval(), batch), tiny.logits(model, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lora", {"rank": 3}, r"another adapter than the one attached.*wrong shape: .*is \(4, 32\) in the file"),
        ("lora", {"new_tokens": []}, "no place for model.embed_tokens.updates.default.rows"),
        ("adalora", {"initial_rank": 5}, "14 matrices of initial rank 4, and would now train 14 .* rank 5"),
        ("adalora", {"targets": ["q_proj"]}, "trained 14 matrices .* would now train 2 matrices"),
        ("adalora", {"tfinal": 1}, "from step 1 to 5, and would now from 1 to 7"),
        ("adalora", {"train_also": ["lm_head"]}, "missing lm_head.updates.default.weight"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(kind, options, message, unbroken, tmp_path):
    model = attached(kind, **options)
    before = tiny.state(model)
    run = trainer(model, tmp_path)
    checkpoint = str(unbroken / kind / "checkpoint-2")
    with pytest.raises((AdapterFileError, TrainingError), match=message):
        run.train(resume_from_checkpoint=checkpoint)
    assert tiny.same_state(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_sft_trainer_saves_and_resumes(kind, tiny_folder, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    texts = Dataset.from_list([{"text": " ".join(str(n % 7) for n in range(i, i + 9))} for i in range(16)])

    def run(folder, seed, **resume):
        model = attached(kind, seed, tf.AutoModelForCausalLM.from_pretrained(tiny_folder))
        options = trl.SFTConfig(
            str(folder), max_steps=STEPS, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=EVERY,
            learning_rate=0.02, disable_tqdm=True, logging_steps=1000, max_length=16,
        )  # fmt: skip
        made = trl.SFTTrainer(model, options, train_dataset=texts, processing_class=tokenizer())
        made.train(**resume)
        made.save_model(str(folder / "end"))

    run(tmp_path / "whole", 0)
    run(tmp_path / "resumed", 1, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same_files(tmp_path / "whole" / "end", tmp_path / "resumed" / "end")
    again = tf.AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = tiny.logits(again, tiny.batch("llama"))
    veneer.load_adapter(again, tmp_path / "resumed" / "end")
    assert (tiny.logits(again, tiny.batch("llama")) - before).abs().max() > 1e-3


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_saves_and_loads_its_state(kind, safe, tmp_path):
    """Before and after the ranks are fixed, some at 0; into the model that goes on, and into a fresh one."""

    def prepared(seed):
        model, accelerator = attached(kind, seed), Accelerator(cpu=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, accelerator, *accelerator.prepare(model, torch.optim.AdamW(trained, lr=0.02))

    def steps(first, accelerator, model, optimizer):
        for step in range(first, STEPS):
            if step in (2, 6) and not (tmp_path / str(step)).exists():
                accelerator.save_state(str(tmp_path / str(step)), safe_serialization=safe)
            optimizer.zero_grad()
            accelerator.backward(model(**tiny.batch("llama", seed=step)).loss)
            optimizer.step()

    model, *others = prepared(0)
    steps(0, *others)
    veneer.save(model, tmp_path / "end")
    if kind == "adalora":
        assert 0 in veneer.allocator(model).ranks().values()
    for first in (6, 2):
        for again, *parts in ((model, *others), prepared(1)):
            parts[0].load_state(str(tmp_path / str(first)))
            steps(first, *parts)
            veneer.save(again, tmp_path / "again")
            assert same_files(tmp_path / "again", tmp_path / "end")


def test_what_resumes_a_run_holds_the_adapter_alone(unbroken):
    keys = set(load_file(unbroken / "adalora" / "checkpoint-6" / "model.safetensors"))
    assert {key for key in keys if ".updates.default." not in key} == {
        "veneer.adapter_only", "veneer.default.progress", "veneer.default.kept",
    }  # fmt: skip
    assert not (unbroken / "lora" / "end" / "model.safetensors").exists()
