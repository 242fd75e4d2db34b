"""The chunked loss against plain cross-entropy, on every architecture and kind of head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
import veneer
import veneer.training.loss as loss_module
from veneer.data.labels import IGNORE, Tokens
from veneer.training.loss import Loss, chunked_log_probabilities, chunked_loss

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK", 5 * tiny.VOCABULARY)


class _Capped(nn.Module):
    """A head that is no plain linear layer."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    @property
    def weight(self):
        return self.head.weight

    def forward(self, x):
        return 3 * torch.tanh(self.head(x) / 3)


@pytest.mark.parametrize("kind", ["frozen", "bias", "trained", "adapted", "capped"])
@pytest.mark.parametrize("count", [1, 5, 13])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_the_plain_loss_and_its_gradients(kind, count, smoothing):
    torch.manual_seed(0)
    head = nn.Linear(8, tiny.VOCABULARY, bias=kind == "bias")
    head.requires_grad_(kind == "trained")
    model = nn.Sequential(head)
    if kind == "adapted":
        veneer.attach(model, veneer.LoRA(rank=2, targets=["0"]))
        nn.init.normal_(model[0].updates["default"].B)
    head = _Capped(model[0]) if kind == "capped" else model[0]
    hidden = torch.randn(count, 8, requires_grad=True)
    labels = torch.randint(tiny.VOCABULARY, (count,))
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    plain = F.cross_entropy(head(hidden), labels, reduction="sum", label_smoothing=smoothing) * 0.3
    ours = chunked_loss(hidden, head, labels, smoothing) * 0.3
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


class _Made(TorchDispatchMode):
    """The tensors that are made within it."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        self.tensors += [(leaf.dtype, leaf.numel()) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_in_bf16_the_loss_is_the_plain_one_and_no_logits_are_made_in_fp32(smoothing):
    torch.manual_seed(0)
    head = nn.Linear(8, tiny.VOCABULARY, bias=False).requires_grad_(False).bfloat16()
    hidden = torch.randn(13, 8).bfloat16().requires_grad_()
    labels = torch.randint(tiny.VOCABULARY, (13,))
    plain = F.cross_entropy(head(hidden).float(), labels, reduction="sum", label_smoothing=smoothing)
    (wanted,) = torch.autograd.grad(plain, hidden)
    with _Made() as made:
        ours = chunked_loss(hidden, head, labels, smoothing)
        (found,) = torch.autograd.grad(ours, hidden)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert (torch.bfloat16, 5 * tiny.VOCABULARY) in made.tensors
    assert max(count for dtype, count in made.tensors if dtype != torch.bfloat16) < tiny.VOCABULARY
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss(hidden, head, labels, smoothing), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["frozen", "capped"])
def test_log_probabilities_by_a_frozen_head_are_the_plain_ones(dtype, kind):
    torch.manual_seed(0)
    head = nn.Linear(8, tiny.VOCABULARY, bias=False).requires_grad_(False).to(dtype)
    head = _Capped(head) if kind == "capped" else head
    hidden = torch.randn(13, 8).to(dtype).requires_grad_()
    labels, weights = torch.randint(tiny.VOCABULARY, (13,)), torch.randn(13)
    plain = -F.cross_entropy(head(hidden).float(), labels, reduction="none")
    ours = chunked_log_probabilities(hidden, head, labels)
    within = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(made @ weights, hidden)[0] for made in (ours, plain))
    torch.testing.assert_close(found, wanted, **within)
    with torch.no_grad():
        torch.testing.assert_close(chunked_log_probabilities(hidden, head, labels), plain, rtol=1e-5, atol=1e-5)


def test_logits_of_the_whole_batch_never_exist():
    sizes = []
    head = nn.Linear(8, tiny.VOCABULARY).requires_grad_(False)
    head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    chunked_loss(torch.randn(13, 8, requires_grad=True), head, torch.zeros(13, dtype=torch.long)).backward()
    assert sizes == [5, 5, 3]


def test_only_the_heads_update_may_be_trained():
    head = nn.Linear(8, tiny.VOCABULARY)
    hidden, labels = torch.randn(7, 8), torch.zeros(7, dtype=torch.long)
    chunked_loss(hidden, head, labels).backward()
    ours = head.weight.grad.clone()
    head.zero_grad()
    F.cross_entropy(head(hidden), labels, reduction="sum").backward()
    torch.testing.assert_close(ours, head.weight.grad, rtol=1e-5, atol=1e-6)


def _rows(seq2seq=False):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate((4, 9, 6)):
        ids = torch.randint(1, tiny.VOCABULARY, (length,), generator=generator).tolist()
        labels = ids[:3] if seq2seq else [IGNORE] * 2 + ids[2:]
        rows.append(Tokens(ids, labels, f"d:{number}"))
    return rows


@pytest.mark.parametrize("name", [name for name in tiny.ARCHITECTURES if name not in ("bert", "t5")])
def test_every_architecture_as_one_row_at_a_time(name):
    model, rows = tiny.build(name), _rows()
    veneer.attach(model, veneer.LoRA(rank=2))
    tiny.train_steps(model, tiny.batch(name), steps=1)
    loss = Loss(model, 0, rows[0], kind="causal")
    assert loss._chunked, "its body and head are known"
    with torch.no_grad():
        plain = sum(
            model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels])).loss * row.learned
            for row in rows
        )
        torch.testing.assert_close(loss(rows), plain, rtol=1e-5, atol=1e-5)
    assert loss.mean(rows, 2) == pytest.approx(float(plain) / sum(row.learned for row in rows), rel=1e-5)


def test_encoder_decoders_and_classifiers():
    model, rows = tiny.build("t5"), _rows(seq2seq=True)
    with torch.no_grad():
        plain = sum(
            model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels])).loss * row.learned
            for row in rows
        )
        torch.testing.assert_close(Loss(model, 0, rows[0], kind="seq2seq")(rows), plain, rtol=1e-5, atol=1e-5)
    model = tiny.build("bert")
    rows = [Tokens(row.ids, [i], row.where) for i, row in enumerate(_rows())]
    with torch.no_grad():
        plain = sum(model(input_ids=torch.tensor([r.ids]), labels=torch.tensor(r.labels)).loss for r in rows)
        torch.testing.assert_close(Loss(model, 0, rows[0], kind="classification")(rows), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("llama", "causal"), ("gpt2", "causal"), ("t5", "seq2seq"),
                                            ("bert", "classification")])  # fmt: skip
def test_targets_are_smoothed_while_training_and_in_no_held_out_loss(name, kind):
    model, rows = tiny.build(name), _rows(seq2seq=kind == "seq2seq")
    rows = [Tokens(row.ids, [1], row.where) for row in rows] if kind == "classification" else rows
    plain, smoothed = (Loss(model, 0, rows[0], kind=kind, smoothing=share) for share in (0.0, 0.2))
    with torch.no_grad():
        assert smoothed.mean(rows, 2) == plain.mean(rows, 2)
        model.training = True  # and none of its parts, which would drop what the plain loss has
        found, without = smoothed(rows), plain(rows)
    logits, labels = [], []
    for row in rows:
        more = {"labels": torch.tensor([row.labels])} if kind == "seq2seq" else {}
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row.ids]), **more).logits
        logits.append(output if kind == "classification" else output[0, : -1 if kind == "causal" else None])
        labels.append(torch.tensor(row.labels[1:] if kind == "causal" else row.labels))
    how = {"ignore_index": IGNORE, "reduction": "sum", "label_smoothing": 0.2}
    wanted = F.cross_entropy(torch.cat(logits), torch.cat(labels), **how)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, without)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_of_classes_are_those_of_torch_over_all_parts_of_a_step(smoothing):
    model, weights = tiny.build("bert"), [0.25, 4.0, 1.5]
    rows = [Tokens(row.ids, [place % 3], row.where) for place, row in enumerate(_rows() * 2)]
    loss = Loss(model, 0, rows[0], kind="classification", smoothing=smoothing, class_weights=weights)
    logits = torch.cat([model(input_ids=torch.tensor([row.ids])).logits for row in rows])
    labels = torch.tensor([row.labels[0] for row in rows])
    plain = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights))(logits, labels)
    assert loss.mean(rows, 2) == pytest.approx(plain.item(), rel=1e-5)
    model.training = True  # and none of its parts
    wanted = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights), label_smoothing=smoothing)(logits, labels)
    head = list(model.classifier.parameters())
    parts = [rows[:1], rows[1:4], rows[4:]]
    share = loss.of_step(parts)
    shares = [share(part) for part in parts]
    torch.testing.assert_close(sum(shares), wanted, rtol=1e-5, atol=1e-5)
    of_parts = [torch.autograd.grad(each, head, retain_graph=True) for each in shares]
    for place, whole in enumerate(torch.autograd.grad(wanted, head)):
        torch.testing.assert_close(sum(each[place] for each in of_parts), whole, rtol=1e-4, atol=1e-6)


def test_weights_of_labels_are_torchs_pos_weight_over_all_parts_of_a_step():
    model, weights = tiny.build("bert"), [0.25, 4.0, 1.5]
    model.config.problem_type = "multi_label_classification"
    several = ([1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1])
    rows = [Tokens(row.ids, several[place % 4], row.where) for place, row in enumerate(_rows() * 2)]
    loss = Loss(model, 0, rows[0], kind="classification", class_weights=weights)
    logits = torch.cat([model(input_ids=torch.tensor([row.ids])).logits for row in rows])
    labels = torch.tensor([row.labels for row in rows], dtype=torch.float32)
    wanted = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))(logits, labels)
    assert loss.mean(rows, 2) == pytest.approx(wanted.item(), rel=1e-5)
    assert wanted.item() != pytest.approx(torch.nn.BCEWithLogitsLoss()(logits, labels).item(), rel=1e-2)
    head = list(model.classifier.parameters())
    parts = [rows[:1], rows[1:4], rows[4:]]
    share = loss.of_step(parts)
    shares = [share(part) for part in parts]
    torch.testing.assert_close(sum(shares), wanted, rtol=1e-5, atol=1e-5)
    of_parts = [torch.autograd.grad(each, head, retain_graph=True) for each in shares]
    for place, whole in enumerate(torch.autograd.grad(wanted, head)):
        torch.testing.assert_close(sum(each[place] for each in of_parts), whole, rtol=1e-4, atol=1e-6)


def test_a_model_that_changes_its_logits_is_asked_for_them():
    model, rows = tiny.build("llama"), _rows()
    plain = model.forward
    model.forward = lambda *args, **kwargs: _doubled(plain(*args, **kwargs))
    loss = Loss(model, 0, rows[0], kind="causal")
    assert not loss._chunked
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([rows[0].ids])).logits[0, :-1]
        wanted = F.cross_entropy(logits, torch.tensor(rows[0].labels[1:]), reduction="sum")
        torch.testing.assert_close(loss(rows[:1]), wanted, rtol=1e-5, atol=1e-5)


def _doubled(output):
    output.logits = output.logits * 2
    return output
