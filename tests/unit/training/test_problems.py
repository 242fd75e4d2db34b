"""The losses of a classifier's three problems against transformers' own, which a model computes of ``labels``."""

from __future__ import annotations

import struct

import pytest
import torch
import transformers as tf

from veneer.data.labels import Tokens
from veneer.training.batches import collate
from veneer.training.loss import Loss

pytestmark = pytest.mark.unit

TYPES = {"classification": "single_label_classification", "multi-label": "multi_label_classification",
         "regression": "regression"}  # fmt: skip
IDS = [[5, 6, 7], [9, 8], [11, 12, 13, 14], [3]]
LABELS = {"classification": [[2], [0], [1], [2]], "multi-label": [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]}
NUMBERS = [0.1, -2.5, 3.0, 1e-3]


def bits(number):
    return list(struct.unpack("<i", struct.pack("<f", number)))


def rows_of(problem):
    labels = [bits(number) for number in NUMBERS] if problem == "regression" else LABELS[problem]
    return [Tokens(ids, each, f"d:{place}") for place, (ids, each) in enumerate(zip(IDS, labels, strict=True))]


def labels_of(problem):
    if problem == "regression":
        return torch.tensor(NUMBERS)
    return torch.tensor(LABELS[problem], dtype=torch.float32 if problem == "multi-label" else torch.long).squeeze(-1)


def model_of(problem, architecture, dtype=torch.float32):
    outputs = 1 if problem == "regression" else 3
    sizes = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "pad_token_id": 0, "num_labels": outputs, "problem_type": TYPES[problem],
    }  # fmt: skip
    torch.manual_seed(0)
    if architecture == "bert":
        model = tf.BertForSequenceClassification(tf.BertConfig(**sizes))
    else:
        model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**sizes))
    return model.to(dtype).eval()


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("problem", TYPES)
def test_the_loss_and_gradients_of_a_step_in_parts_are_transformers(problem, architecture):
    model, rows = model_of(problem, architecture), rows_of(problem)
    loss = Loss(model, 0, rows[0], kind="classification")
    parts = [rows[:1], rows[1:]]
    share = loss.of_step(parts)
    shares = [share(part) for part in parts]
    batch = collate(rows, 0, problem=problem)
    wanted = model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels_of(problem)).loss
    torch.testing.assert_close(sum(shares), wanted, rtol=1e-5, atol=1e-6)
    assert loss.mean(rows, 2) == pytest.approx(wanted.item(), rel=1e-5)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = [torch.autograd.grad(each, leaves, allow_unused=True, retain_graph=True) for each in shares]
    for place, whole in enumerate(torch.autograd.grad(wanted, leaves, allow_unused=True)):
        if whole is not None:
            torch.testing.assert_close(ours[0][place] + ours[1][place], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
def test_the_loss_of_a_model_in_16_bits_is_computed_in_fp32(problem):
    model, rows = model_of(problem, "bert", torch.bfloat16), rows_of(problem)
    loss = Loss(model, 0, rows[0], kind="classification")(rows)
    assert loss.dtype is torch.float32
    batch = collate(rows, 0, problem=problem)
    assert batch.labels.dtype is torch.float32
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits.float()
    if problem == "regression":
        wanted = torch.nn.functional.mse_loss(logits.squeeze(-1), labels_of(problem), reduction="sum")
    else:
        wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels_of(problem), reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=0, atol=0)
