"""The real packaged language model: what it says, that it learns, and the public face as the design writes it."""

from __future__ import annotations

import io
import statistics
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from rich.console import Console

import veneer
from veneer.data.formats import Example, to_examples
from veneer.data.labels import Renderer
from veneer.data.read import read_rows
from veneer.demo import demo, free_folder
from veneer.generation.generate import continuations
from veneer.generation.likelihood import likeliest
from veneer.models.load import load
from veneer.runs.folder import RunFolder
from veneer.runs.prepare import renderer_of
from veneer.training.fused import fused_passes
from veneer.training.loss import Loss

pytestmark = pytest.mark.recipe

CAPITAL = ({"role": "user", "content": "What is the capital of France?"},)


def _answer(model, tokenizer):
    renderer = Renderer(tokenizer)
    return continuations(model, renderer, [renderer.turn(CAPITAL)], max_new_tokens=12)[0]


def test_it_knows_the_capital_of_france(smollm2):
    model, tokenizer = smollm2
    assert _answer(model, tokenizer) == "The capital of France is Paris."
    assert model.name_or_path == "smollm2-135m-instruct"
    assert model.num_parameters() == 134_515_008


def test_its_folder_loads_to_the_same_logits_and_4_bits_still_know_it(smollm2, smollm2_folder):
    ids = torch.tensor([Renderer(smollm2[1]).turn(CAPITAL)])
    with torch.no_grad():
        wanted = smollm2[0](ids).logits
        assert torch.equal(load(smollm2_folder)[0](ids).logits, wanted)
    model, tokenizer = load(smollm2_folder, "nf4")
    assert "Paris" in _answer(model, tokenizer)
    with veneer.int8_activations(model):
        assert "Paris" in _answer(model, tokenizer)


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_the_gradients_of_a_step_in_bf16_point_where_those_in_fp32_do(smollm2_folder, storage):
    """Adapter matrices of one step on rows of the demo; B is random, for A has no gradient where it is zero. The goal,
    0.999 for each, is not reached: what the residual stream loses in bf16 is felt by a third of them."""
    rows = [example for example, _ in zip(to_examples(read_rows("bbc-topics")).items, range(8), strict=False)]
    gradients = []
    for compute in ("fp32", "bf16"):
        model, tokenizer = load(smollm2_folder, storage, compute=compute)
        renderer = renderer_of(model, tokenizer)
        tokens = [renderer.one(row) for row in rows]
        torch.manual_seed(0)
        veneer.attach(model, veneer.LoRA(rank=8))
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(parameter, std=0.01)
        model.train()
        loss = Loss(model, renderer.pad, tokens[0], kind="causal")
        with fused_passes(model), loss.attention():
            loss.of_step([tokens])(tokens).backward()
        gradients.append({name: p.grad.flatten() for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * 7 * 30
    cosines = {name: float(F.cosine_similarity(g, gradients[1][name], dim=0)) for name, g in gradients[0].items()}
    worst = min(cosines, key=lambda name: cosines[name])
    assert cosines[worst] >= 0.97, (worst, cosines[worst])
    assert statistics.median(cosines.values()) >= 0.999


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_the_public_face(smollm2_folder, storage, tmp_path, monkeypatch):
    """The lines of the design's block in its order; the model comes from a folder, which loads in a moment."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = veneer.load(smollm2_folder, storage=storage)
    veneer.attach(model, veneer.LoRA(rank=16, alpha=32, targets="all-linear"))
    table = veneer.trainable(model)
    assert (
        table.parameters
        == 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
        == sum(row.parameters for row in table.rows)
    )
    assert str(table).endswith("4,884,480 of 134,515,008 parameters are trained (3.63 %)")

    ids = tokenizer("The capital of Elbonia is Mudville.", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5

    with torch.no_grad():
        adapted = model(ids).logits
    veneer.save(model, "adapter/")
    veneer.merge(model)
    model.save_pretrained("merged/")
    with torch.no_grad():
        merged = tf.AutoModelForCausalLM.from_pretrained("merged/")(ids).logits
        torch.testing.assert_close(merged, adapted, rtol=0, atol=5e-3)
        del model
        again, _ = veneer.load(smollm2_folder, storage=storage)
        veneer.load_adapter(again, "adapter/")
        torch.testing.assert_close(again(ids).logits, adapted, rtol=0, atol=1e-4)


class Demo(NamedTuple):
    """What the demo gave, what it printed, and its run's folder."""

    before: float
    after: float
    printed: str
    folder: Path


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """A function: the demo over a storage, once, with a few steps."""

    @cache
    def shown(storage: str) -> Demo:
        folder, console = tmp_path_factory.mktemp(storage) / "demo", Console(file=io.StringIO(), width=120)
        how = {"steps": 8, "batch_size": 8, "held_out": 30}
        return Demo(*demo(folder, console, storage=storage, **how), console.file.getvalue(), folder)

    return shown


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_the_demo(demos, storage):
    before, after, shown, folder = demos(storage)
    assert before < after
    assert f"accuracy before: {100 * before:.1f} %   after: {100 * after:.1f} %" in shown
    assert (
        f"Loading smollm2-135m-instruct, a real language model that comes inside a Python package, in {storage} …"
        in (shown)
    )
    assert "one of business, entertainment, politics, sports, tech." in shown
    assert "Three held-out headlines" in shown
    assert f".venv/bin/veneer chat {folder} --both" in shown
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert free_folder(folder) == folder.with_name("demo-2"), "no run is overwritten"
    assert free_folder(folder.with_name("other")) == folder.with_name("other")


def test_a_few_steps_lower_the_held_out_loss(demos):
    metrics = RunFolder(demos("fp32").folder).metrics()
    before, *_, after = (record["held_out_loss"] for record in metrics if "held_out_loss" in record)
    assert after < 2 < before
    losses = [record["loss"] for record in metrics if "loss" in record]
    assert losses[-1] < losses[0] / 2


@torch.no_grad()
def test_predicted_topics_are_those_of_a_plain_computation_and_of_evaluate(smollm2):
    """Whether the prompts have a beginning in common or not."""
    model, tokenizer = smollm2
    renderer = renderer_of(model, tokenizer)
    topics = ["business", "entertainment", "politics", "sports", "tech"]
    answers = [tokenizer(f" {topic}").input_ids[0] for topic in topics]
    for before in ("", f"Answer with one of these words: {', '.join(topics)}.\n\n"):
        rows = [{"prompt": before + row.fields["prompt"]} for row in read_rows("bbc-topics")[::200]]
        predicted = veneer.predict(model, tokenizer, data=rows, labels=topics, console=Console(file=io.StringIO()))
        for row, each in zip(rows, predicted, strict=True):
            logits = model(tokenizer(row["prompt"], return_tensors="pt").input_ids).logits[0, -1, answers]
            assert list(each.probabilities.values()) == pytest.approx(logits.softmax(-1).tolist(), rel=1e-3)
        examples = [Example("d", prompt=row["prompt"], answer="a") for row in rows]
        chosen = likeliest(model, renderer, examples, [f" {topic}" for topic in topics], 4)
        assert [label.strip() for label in chosen] == [each.text for each in predicted]
