"""Training the model's own weights: which ones, what the run leaves, and what reads it back."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from rich.console import Console

import tiny
import veneer
from veneer.commands.evaluate import evaluate
from veneer.commands.export import export_to
from veneer.commands.generate import answer
from veneer.commands.merge import merge_to
from veneer.errors import ConfigError, ModelError, TargetError, TrainingError
from veneer.runs.opened import open_named
from veneer.runs.train import resume
from veneer.training.config import TrainConfig
from veneer.training.own_weights import train_own_weights

pytestmark = pytest.mark.unit

RATES = {"full": 3e-3, "bias": 3e-2, "head": 1e-2}
FULL_OR_HEAD = ["full", "head"]  # of a Llama, which has no biases


def _train(model, rows_file, output, method, **more):
    options = {
        "steps": 12, "batch_size": 8, "held_out": 16, "evaluate_every": 5, "checkpoint_every": 4, "seed": 1,
        "learning_rate": RATES[method], "console": Console(file=io.StringIO()),
    }  # fmt: skip
    return veneer.train(str(model), data=str(rows_file), output=str(output), method=method, **{**options, **more})


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """The folder of a finished run of full fine-tuning."""
    folder = tmp_path_factory.mktemp("full")
    rows = [{"prompt": f"{a}{b}:", "completion": " yes" if a < "g" else " no"} for a in "bcdfgklm" for b in "aeiou"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _train(tiny_folder, folder / "rows.jsonl", folder / "run", "full", steps=30, batch_size=16)
    return folder / "run"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "bert", "gpt2", "t5"])
@pytest.mark.parametrize("method", ["full", "bias", "head"])
def test_which_weights_are_trained(name, method):
    model = tiny.build(name)
    if name in ("llama-tied", "t5") and method == "bias":
        before = {path: p.requires_grad for path, p in model.named_parameters()}
        with pytest.raises(TargetError, match="have no biases"):
            train_own_weights(model, method)
        assert before == {path: p.requires_grad for path, p in model.named_parameters()}
        return
    before = tiny.state(model)
    train_own_weights(model, method)
    assert tiny.same_state(model, before)
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    everything = {path for path, _ in model.named_parameters()}
    head = {path for path in everything if path.startswith(("lm_head", "classifier"))}
    biases = {path for path in everything if path.endswith(".bias")}
    wanted = {"full": everything, "head": head, "bias": biases | (head if name == "bert" else set())}
    assert trained == wanted[method] != set()


def test_a_trained_head_leaves_a_tied_embedding_alone():
    model = tiny.build("llama-tied")
    train_own_weights(model, "head")
    inputs = tiny.batch("llama-tied")
    before = model.model.embed_tokens.weight.clone()
    tiny.train_steps(model, inputs)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not torch.equal(model.lm_head.weight, before)
    assert model.config.tie_word_embeddings is False


def test_the_gradients_are_those_of_the_plain_model(tiny_folder, rows_file, tmp_path, monkeypatch):
    """With the passes replaced as in every run: only those of frozen modules may be."""
    found = {}
    from veneer.training import loop

    original = loop.take_step

    def spy(run_, rows, rate):
        run_.config.__dict__["clip"] = 0.0
        out = original(run_, rows, 0.0)
        model, batch = run_.model, loop.Batches(rows, len(rows), 0).rows(0)
        found["ours"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        plain, _ = veneer.load(tiny_folder)
        learned = sum(row.learned for row in batch)
        for row in batch:
            ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
            logits = plain(input_ids=ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / learned
            loss.backward()
        found["plain"] = {name: p.grad for name, p in plain.named_parameters()}
        return out

    monkeypatch.setattr(loop, "take_step", spy)
    _train(tiny_folder, rows_file, tmp_path / "run", "full", steps=1, learning_rate=1e-9)
    assert found["ours"].keys() == found["plain"].keys()
    for name, gradient in found["plain"].items():
        torch.testing.assert_close(found["ours"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", FULL_OR_HEAD)
def test_what_a_run_leaves_is_a_model_that_loads_back(tiny_folder, rows_file, tmp_path, method):
    result = _train(tiny_folder, rows_file, tmp_path / "run", method)
    assert result.loss_after < result.loss_before
    assert result.written == tmp_path / "run" / "model"
    assert not (tmp_path / "run" / "adapter").exists()
    model, tokenizer = veneer.load(result.written)
    inputs = {"input_ids": tokenizer("bat:", return_tensors="pt").input_ids}
    assert torch.equal(tiny.logits(model, inputs), tiny.logits(result.model, inputs))
    base, _ = veneer.load(tiny_folder)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert changed == ({"lm_head.weight"} if method == "head" else {n for n, _ in base.named_parameters()})


@pytest.mark.parametrize("method", ["full", "bias", "head"])
def test_a_classifier(tiny_encoder, rows_file, tmp_path, method):
    result = _train(tiny_encoder, rows_file, tmp_path / "run", method, steps=40)
    assert result.loss_after < result.loss_before
    opened = open_named(result.folder)
    inputs = {"input_ids": torch.tensor([[72, 69, 76]])}
    assert torch.equal(tiny.logits(opened.model, inputs), tiny.logits(result.model, inputs))
    assert opened.renderer.classes == ("no", "yes")
    found = evaluate(result.folder)
    assert found.adapter.loss == pytest.approx(result.loss_after)
    assert found.base.loss == pytest.approx(result.loss_before)


@pytest.mark.parametrize(("method", "optimizer"), [("full", "paged-adamw"), ("full", "adamw"), ("head", "adamw")])
def test_a_resumed_run_ends_in_the_same_bytes(tiny_folder, rows_file, tmp_path, method, optimizer):
    whole = _train(tiny_folder, rows_file, tmp_path / "whole", method).folder
    broken = _train(tiny_folder, rows_file, tmp_path / "broken", method, optimizer=optimizer).folder
    for later in ("model", "best", "checkpoints/step-000012"):
        shutil.rmtree(broken / later)
    resume(broken, console=Console(file=io.StringIO()))
    for file in ("model/model.safetensors", "best/trained.safetensors", "model/config.json"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes(), file


def test_the_best_weights_are_the_result(tiny_folder, rows_file, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "bat:", "completion": " maybe"}\n')  # the more is learned, the worse
    result = _train(
        tiny_folder, rows_file, tmp_path / "run", "full", steps=30, held_out=str(held_out), learning_rate=1e-2
    )
    assert 0 < result.best_step < 30
    again, _ = veneer.load(result.written)
    found = evaluate(result.folder)
    assert found.adapter.loss == pytest.approx(result.loss_after)
    assert tiny.same_state(again, tiny.state(result.model))


def test_evaluate_compares_with_the_model_before(run, tiny_folder):
    found = evaluate(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert found.base.loss == pytest.approx(losses[0])
    assert found.adapter.loss == pytest.approx(min(losses[1:]))
    assert any(example.base != example.adapter for example in found.examples)


def test_what_asks_for_an_adapter_is_refused(run, tmp_path):
    with pytest.raises(ModelError, match=r"no adapter to merge: .*model is a model already"):
        merge_to(str(run), tmp_path / "merged")
    with pytest.raises(ModelError, match="no adapter to export"):
        export_to(run, tmp_path / "plain")
    for asked in ({"both": True}, {"base": True}):
        with pytest.raises(ConfigError, match="its base is not in it"):
            answer(str(run), "ba:", **asked)
    assert set(answer(str(run), "ba:", max_new_tokens=4)) == {"model"}


def test_a_run_that_has_not_finished_has_no_result(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(TrainingError, match="has no model yet"):
        open_named(tmp_path / "run")


@pytest.mark.parametrize("method", ["full", "bias", "head"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rank": 4}, "rank is an option of method: lora, and the method is {}, which has none of its own"),
        ({"targets": ["q_proj"]}, "targets is an option of method: lora"),
        ({"target_rank": 4}, "target_rank is an option of method: adalora"),
        ({"storage": "nf4"}, "method: {} trains the model's own weights, which are kept in fp32 then"),
        ({"storage": "bf16"}, "leave out storage: bf16"),
    ],
)
def test_options_of_updates_and_other_storages_are_refused(method, option, message):
    with pytest.raises(ConfigError) as refused:
        TrainConfig(model="m", data="d", output="o", method=method, **option)
    assert message.format(method) in str(refused.value)


def test_a_model_in_codes_or_with_adapters_is_refused(tiny_folder, rows_file, tmp_path):
    quantised, _ = veneer.load(tiny_folder, storage="nf4")
    with pytest.raises(TargetError, match="is kept in codes, which cannot be trained"):
        train_own_weights(quantised, "full")
    adapted, _ = veneer.load(tiny_folder)
    veneer.attach(adapted, veneer.LoRA(rank=2))
    with pytest.raises(TargetError, match="remove its adapters first"):
        train_own_weights(adapted, "full")
    encoder = tiny.build("bert").bert
    with pytest.raises(TargetError, match="BertModel has no output head"):
        train_own_weights(encoder, "head")


def test_the_command_says_what_was_written(tiny_folder, rows_file, tmp_path, veneer_command):
    done = veneer_command(
        "train", "--model", tiny_folder, "--data", rows_file, "--output", tmp_path / "run", "--method", "full",
        "--steps", 2, "--held-out", 8,
    )  # fmt: skip
    assert done.code == 0
    assert f"Model of step 2 written to {tmp_path / 'run' / 'model'}." in done.out
    assert f"veneer chat {tmp_path / 'run'}   or   veneer report" in done.out
    assert "2 steps, finished" in veneer_command("inspect", tmp_path / "run").out


def test_gradient_checkpointing_gives_the_same_weights(tiny_folder, rows_file, tmp_path):
    plain = _train(tiny_folder, rows_file, tmp_path / "plain", "full", steps=3)
    less = _train(tiny_folder, rows_file, tmp_path / "less", "full", steps=3, gradient_checkpointing=True)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(less.model.get_parameter(name), parameter, rtol=1e-3, atol=1e-5, msg=name)
