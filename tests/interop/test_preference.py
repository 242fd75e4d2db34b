"""DPO, ORPO and KTO: the losses of trl's trainers and their gradients, for the same model and rows."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import tiny
import veneer
from tokens import tokenizer
from veneer.data.formats import to_examples
from veneer.data.labels import Renderer
from veneer.data.pairs import to_judged, to_pairs
from veneer.data.read import Row
from veneer.training.loss import Loss
from veneer.training.preference import Preference, PreferenceLoss

pytestmark = pytest.mark.interop

PAIRS = [
    {"prompt": f"{word}:", "chosen": chosen, "rejected": rejected}
    for word, chosen, rejected in (
        ("cat", " yes", " never"), ("doggie", " no, it is not", " perhaps"), ("x", " it may", " it"),
        ("owl", " yes", " by night alone"),
    )
]  # fmt: skip
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
    for row, good in zip(PAIRS, (True, False, False, True), strict=True)
]
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def models(tmp_path):
    """The model with Veneer's adapter, and what makes the same one for trl."""
    tiny.llama_folder(tmp_path / "model", tokenizer(begin=True))

    def load():
        return tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    ours = load()
    torch.manual_seed(0)
    veneer.attach(ours, veneer.LoRA(rank=4, alpha=8, targets=TARGETS, dropout=0.0))
    return ours, load


def trained_by_trl(trainer_type, config_type, model, rows, folder, **options):
    """The trainer, and the one batch of its rows."""
    config = config_type(
        output_dir=str(folder / "trl"), use_cpu=True, report_to=[], per_device_train_batch_size=len(rows), beta=0.3,
        max_length=100, bf16=False, **options,
    )  # fmt: skip
    trainer = trainer_type(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(begin=True),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    )  # fmt: skip
    return trainer, next(iter(trainer.get_train_dataloader()))


def preference_loss(model, pairs, preference):
    """Ours, with the model as it is for a reference."""
    likelihood = Loss(model, 0, pairs[0].first, kind="causal")
    assert likelihood.how == (True, True)
    loss = PreferenceLoss(likelihood, preference, model, torch.full((len(pairs), 2), math.nan, dtype=torch.float64))
    loss.refer([pairs[:3], pairs[3:]])
    return loss


def set_weights(ours, theirs):
    """Both adapters take random values; yields (our parameter, trl's)."""
    named = dict(theirs.named_parameters())
    torch.manual_seed(1)
    for name, module in ours.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            for part in "AB":
                mine = getattr(module.updates["default"], part)
                other = named[f"base_model.model.{name}.lora_{part}.default.weight"]
                with torch.no_grad():
                    other.copy_(torch.nn.init.normal_(mine, std=0.5))
                yield mine, other


def check_loss_and_gradients(loss, pairs, matched, trainer, batch):
    wanted = trainer.compute_loss(trainer.model, batch)
    wanted.backward()
    parts = [pairs[:1], pairs[1:]]  # micro batches: the step's loss all the same
    share = loss.of_step(parts)
    got = 0.0
    with loss.attention():
        for part in parts:
            value = share(part)
            value.backward()
            got += float(value.detach())
    assert got == pytest.approx(wanted.item(), abs=1e-5)
    for mine, other in matched:
        assert other.grad.abs().max() > 1e-4
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)


def examples(rows):
    return to_examples([Row(row, f"d:{number}") for number, row in enumerate(rows, 1)]).items


def test_dpo(models, tmp_path):
    ours, load = models
    trainer, batch = trained_by_trl(DPOTrainer, DPOConfig, load(), PAIRS, tmp_path)
    pairs, _ = to_pairs(Renderer(tokenizer(begin=True)), examples(PAIRS))
    loss = preference_loss(ours, pairs, Preference("dpo", 0.3))
    theirs = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sorted(theirs) == sorted(side.ids for pair in pairs for side in (pair.first, pair.second))
    check_loss_and_gradients(loss, pairs, list(set_weights(ours, trainer.model)), trainer, batch)


def test_kto(models, tmp_path):
    ours, load = models
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    trainer, batch = trained_by_trl(KTOTrainer, KTOConfig, load(), JUDGED, tmp_path, **weights)
    pairs, _ = to_judged(Renderer(tokenizer(begin=True)), examples(JUDGED))
    for name, sides in (("", [pair.first for pair in pairs]), ("KL_", [pair.second for pair in pairs])):
        masked = zip(batch[f"{name}input_ids"], batch[f"{name}attention_mask"], strict=True)
        assert [ids[mask.bool()].tolist() for ids, mask in masked] == [side.ids for side in sides]
    loss = preference_loss(ours, pairs, Preference("kto", 0.3, (1.5, 0.5)))
    matched = list(set_weights(ours, trainer.model))
    check_loss_and_gradients(loss, pairs, matched, trainer, batch)
    assert trainer._metrics["train"]["kl"][-1] > 0.01, "else it does not show"


@pytest.mark.parametrize("prompted", [True, False])
def test_orpo(prompted, models, tmp_path):
    """trl's likelihood is of prompts, too, so the whole losses are equal where these are empty, and else the odds'."""
    ours, load = models
    rows = PAIRS if prompted else [{**row, "prompt": ""} for row in PAIRS]
    trainer, batch = trained_by_trl(ORPOTrainer, ORPOConfig, load(), rows, tmp_path)
    pairs, _ = to_pairs(Renderer(tokenizer(begin=True)), examples(rows))
    loss = preference_loss(ours, pairs, Preference("orpo", 0.3))
    matched = list(set_weights(ours, trainer.model))
    if not prompted:
        check_loss_and_gradients(loss, pairs, matched, trainer, batch)
        return
    whole, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    with torch.no_grad():
        tokens = sum(pair.first.learned for pair in pairs)
        likelihood = -sum(float(loss._likelihood.log_probabilities([pair.first]).sum()) for pair in pairs) / tokens
        odds = float(loss.of_step([pairs])(pairs)) - likelihood
    assert odds == pytest.approx(float(whole) - metrics["nll_loss"], abs=1e-5)
