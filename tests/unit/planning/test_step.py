"""A step without values makes what the step itself makes: the same blocks, in the same order."""

from __future__ import annotations

import copy
import logging
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import tiny
import veneer
from veneer.data.labels import IGNORE, Tokens
from veneer.data.pairs import Pair, sequences
from veneer.frozen import blockwise
from veneer.frozen.exact import kept_values
from veneer.frozen.layers import compute_in, quantise_linear_layers
from veneer.planning import ledger as ledgers
from veneer.planning import repeat
from veneer.planning.empty import Base, empty_model, no_values
from veneer.planning.ledger import Ledger
from veneer.planning.step import _how, trace_step
from veneer.training.fused import fused_passes
from veneer.training.loss import Loss, chunked_loss
from veneer.training.preference import Preference, loss_of
from veneer.training.recompute import keeping_layers, recomputed

pytestmark = pytest.mark.unit

LENGTHS = (13, 13, 9, 5)
CAUSAL = [name for name in tiny.ARCHITECTURES if name not in ("bert", "t5")]


@pytest.fixture(autouse=True)
def _the_same_wherever_it_runs(monkeypatch):
    """The room of panels grows to the largest, and other tests had large ones."""
    monkeypatch.setattr(blockwise, "_room", threading.local())


def _rows(kind="causal", lengths=LENGTHS):
    if kind == "classification":
        return [Tokens([1] * length, [0], "") for length in lengths]
    return [Tokens(list(range(1, length + 1)), [IGNORE] * 2 + [3] * (length - 2), "") for length in lengths]


def _base(name, storage="fp32", compute=torch.float32):
    kind = {"bert": "classification", "t5": "seq2seq"}.get(name, "causal")
    dense = torch.bfloat16 if storage == "bf16" else torch.float32
    return Base(name, tiny.build(name).config, kind, storage, 64, True, dense, compute=compute)


def _real(name, base, update, count, rows=None, preference=None):
    """Sizes of the blocks that the step makes, as it is taken with values, and the loss's way."""
    model = tiny.build(name)
    if base.storage == "bf16":
        for parameter in model.parameters():  # buffers stay, as they do where a model is loaded
            parameter.data = parameter.data.bfloat16()
    elif base.storage != "fp32":
        quantise_linear_layers(model, storage=base.storage, block_size=64, double_quantisation=True)
    if base.compute is not base.dense:
        compute_in(model, base.compute)
    torch.manual_seed(0)
    veneer.attach(model, update)
    model.train()
    rows = rows or _rows(base.kind)
    likelihood = Loss(model, 0, sequences(rows[0])[0], kind=base.kind)
    loss = loss_of(likelihood, preference, model, torch.zeros(1, 2, dtype=torch.float64))
    ledger = Ledger([*model.parameters(), *model.buffers()])
    ledger.begin("all")
    with ExitStack() as stack:
        for context in (recomputed(model, count), fused_passes(model), loss.attention(), ledger):
            stack.enter_context(context)
        loss.of_step([rows])(rows).backward()
    return ledger.stretches, loss.how, model


def _live(stretches):
    """The most bytes that are there at a time."""
    sizes, live, most = {}, 0, 0
    for stretch in stretches:
        for event in stretch.events:
            live += event.size or -sizes[event.block]
            sizes[event.block] = event.size
            most = max(most, live)
    return most


LORA, ADALORA = veneer.LoRA(rank=3), veneer.AdaLoRA(target_rank=2, total_steps=10)


@pytest.mark.parametrize(("name", "update"), [*((name, LORA) for name in tiny.ARCHITECTURES), ("llama", ADALORA)])
def test_without_values_as_much_is_made_as_with_them(name, update):
    base = _base(name)
    real, how, _ = _real(name, base, update, 0)
    step = trace_step(base, update, _rows(base.kind), how=how)
    assert _live(step.stretches) == pytest.approx(_live(real), rel=0.01)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_of_pairs_as_much_is_made_as_with_values(objective):
    base, preference = _base("llama"), Preference(objective, 0.1)
    pairs = [Pair.of(row, row, True if objective == "kto" else None) for row in _rows()]
    real, how, _ = _real("llama", base, LORA, 0, pairs, preference)
    step = trace_step(base, LORA, pairs, how=how, preference=preference)
    assert _live(step.stretches) == pytest.approx(_live(real), rel=0.01)


@pytest.mark.parametrize("count", [0, 1, None])
@pytest.mark.parametrize(("name", "update"), [("llama", LORA), ("gpt2", LORA), ("t5", LORA), ("llama", ADALORA)])
def test_with_dropout(name, update, count):
    base, update, rows = _base(name), update.model_copy(update={"dropout": 0.1}), _rows(_base(name).kind)
    real, how, _ = _real(name, base, update, count)
    step = trace_step(base, update, rows, recomputed=count, how=how)
    assert _live(step.stretches) == pytest.approx(_live(real), rel=0.01)
    if name == "llama":  # in the others the most is there where nothing is dropped
        without = trace_step(base, update.model_copy(update={"dropout": 0.0}), rows, recomputed=count, how=how)
        assert _live(step.stretches) > _live(without.stretches)


def test_while_a_step_is_planned_another_thread_drops_as_before(monkeypatch):
    """The planner's one seed, and its one block of the loss, are its own model's."""
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=3, dropout=0.5))
    tiny.train_steps(model, tiny.batch("llama"), steps=1)
    model.train()
    outputs = []

    def look():
        torch.manual_seed(0)
        hidden = model.model(tiny.batch("llama")["input_ids"]).last_hidden_state
        outputs.append(hidden.detach())
        blocks = []
        with monkeypatch.context() as patch:
            split = torch.split
            patch.setattr(torch, "split", lambda x, size: blocks.append(size) or split(x, size))
            chunked_loss(hidden[0], model.lm_head, torch.zeros(len(hidden[0]), dtype=torch.long))
        outputs.append(torch.tensor(blocks))

    def look_aside(self, name, layer=-1):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return begin(self, name, layer)

    look()
    begin = Ledger.begin
    monkeypatch.setattr(Ledger, "begin", look_aside)
    trace_step(_base("llama"), veneer.LoRA(rank=3, dropout=0.1), _rows())
    assert len(outputs) > 4
    for hidden, blocks in zip(outputs[2::2], outputs[3::2], strict=True):
        assert torch.equal(hidden, outputs[0])
        assert torch.equal(blocks, outputs[1])


def test_dropout_draws_a_mask_forward_and_two_backward():
    base, rows = _base("llama"), _rows()
    step = trace_step(base, veneer.LoRA(rank=3, dropout=0.1), rows)
    drawn = [one for stretch in step.stretches for one in stretch.operations if one.kind == "random"]
    # Of seven products in each of two layers; the input of the first three has no gradient.
    assert len(drawn) == 3 * 7 * 2 - 3


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["fp32", "nf4", "int8", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_over_other_storages(name, storage, compute):
    base, update = _base(name, storage, compute), veneer.LoRA(rank=3)
    real, how, model = _real(name, base, update, 0)
    step = trace_step(base, update, _rows(), how=how)
    assert _live(step.stretches) == pytest.approx(_live(real), rel=0.02)
    tensors = (*model.parameters(), *model.buffers(), *kept_values(model))
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors if t.numel()}
    weights = step.weights
    assert weights.codes + weights.scales + weights.dense + weights.trained == sum(held.values())


def test_what_has_no_fake_result_is_an_exception_and_no_log(monkeypatch):
    logged = []
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "handle", logged.append)
    with pytest.raises(RuntimeError, match="2"):
        no_values(lambda: torch.mm(torch.ones(2, 3), torch.ones(2, 3)))
    assert not logged


@pytest.mark.parametrize("storage", ["fp32", "nf4", "bf16"])
@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_mixtures_of_experts(name, storage):
    base = _base(name, storage)
    real, how, _ = _real(name, base, LORA, 0)
    step = trace_step(base, LORA, _rows(), how=how)
    assert _live(step.stretches) == pytest.approx(_live(real), rel=0.02)


@pytest.mark.parametrize("update", [LORA, "full"])
def test_of_experts_products_are_counted_by_the_tokens_that_each_gets(update, monkeypatch):
    """Together that is every token num_experts_per_tok times, however many experts there are."""
    base = _base("olmoe")
    monkeypatch.setattr(ledgers, "_PRODUCTS", {"_grouped_mm"})
    experts = trace_step(base, update, _rows())
    own = sum(one.flops for stretch in experts.stretches for one in stretch.operations if one.kind == "products")
    # Gate, up and down, forward and to the input, and to the weights where these are trained; in two layers.
    passes = 3 if update == "full" else 2
    assert own == 2 * passes * 2 * (2 * sum(LENGTHS)) * 32 * (3 * 48)


@pytest.mark.parametrize("name", CAUSAL)
def test_without_trying_it_is_known_how_the_loss_is_computed(name):
    model = tiny.build(name)
    tried = Loss(model, 0, _rows()[0], kind="causal").how
    assert no_values(lambda: _how(empty_model(_base(name)), "causal", _rows()[0])) == tried


def test_a_modules_copy_is_of_the_same_mode():
    """A mode's copy has the same weak references to storages. Freed twice, one is freed for another storage, which may
    be in use: the process crashes, sooner or later, anywhere."""

    def copied():
        layer = nn.Linear(2, 2)
        return copy.deepcopy(layer).weight.fake_mode is layer.weight.fake_mode

    assert no_values(copied)


@pytest.mark.parametrize(("name", "count"), [("llama", 0), ("llama", 7), ("gemma3", None), ("gpt2", 3)])
def test_layers_that_are_left_out_do_as_their_neighbours(name, count, monkeypatch):
    base = _base(name)
    base.config.num_hidden_layers = 14
    if getattr(base.config, "layer_types", None):
        base.config.layer_types = ["sliding_attention"] * 14
    few = trace_step(base, veneer.LoRA(rank=3), _rows(), recomputed=count)
    monkeypatch.setattr(repeat, "SHOWN", 100)
    whole = trace_step(base, veneer.LoRA(rank=3), _rows(), recomputed=count)
    assert [(stretch.name, stretch.layer) for stretch in few.stretches] == [
        (stretch.name, stretch.layer) for stretch in whole.stretches
    ]
    assert _live(few.stretches) == _live(whole.stretches)
    flops = [sum(o.flops * o.times for s in step.stretches for o in s.operations) for step in (few, whole)]
    assert flops[0] == pytest.approx(flops[1])


def test_each_layer_more_that_is_recomputed_takes_less():
    base, update, rows = _base("llama"), veneer.LoRA(rank=3), _rows(lengths=(40, 40))
    base.config.num_hidden_layers = 4
    peaks = [_live(trace_step(base, update, rows, recomputed=count).stretches) for count in (0, 1, 2, 3, 4)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 5


@pytest.mark.parametrize(("name", "count"), [("llama", 1), ("llama", None), ("gpt2", 1), ("t5", None), ("bert", 1)])
def test_recomputed_layers_give_the_same_gradients_and_keep_less(name, count):
    base, update = _base(name), veneer.LoRA(rank=3)
    kept, _, model = _real(name, base, update, 0)
    less, _, other = _real(name, base, update, count)
    assert _live(less) < _live(kept)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None and name == "llama":  # the others drop at random
            assert torch.equal(one.grad, two.grad)


def test_below_the_lowest_adapter_no_layer_keeps_anything_and_none_is_recomputed():
    model = tiny.build("llama")
    veneer.attach(model, veneer.LoRA(rank=2, layers=[1]))
    assert keeping_layers(model) == [model.model.layers[1]]
    with recomputed(model, None):
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [False, True]
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_what_a_llama_layer_keeps():
    """docs/plan.md, by hand: d hidden, k of keys and values, f of the gate, n tokens, r rank."""
    d, k, f, r, n, heads = 32, 16, 48, 3, sum(LENGTHS), 4
    base = _base("mistral")  # no biases
    base.config.num_hidden_layers = 12
    step = trace_step(base, veneer.LoRA(rank=r), _rows())
    (forward,) = (s for s in step.stretches if s.name == "forward" and s.layer == 6)
    sizes = {}
    for stretch in step.stretches:
        if stretch.name == "loss":
            break
        for event in stretch.events:
            sizes[event.block] = event.size
            if not event.size:
                del sizes[event.block]
    kept = sum(sizes[event.block] for event in forward.events if event.block in sizes)
    norms = 2 * n  # one number a row
    # Two residual sums, queries, keys and values rotated or not, what attention gives,
    # its logarithms, gate and up, and x Aᵀ of seven matrices.
    numbers = 2 * d * n + (d + 2 * k) * n + d * n + heads * n + 2 * f * n + 7 * r * n + norms
    assert kept == pytest.approx(4 * numbers, rel=0.02)


@pytest.mark.parametrize("layers", [2, 7])
def test_the_gradients_stay(layers):
    base = _base("llama")
    base.config.num_hidden_layers = layers
    step = trace_step(base, LORA, _rows())
    taken = {event.block: event.size for stretch in step.stretches for event in stretch.events if event.size}
    gone = {event.block for stretch in step.stretches for event in stretch.events if not event.size}
    stay = sum(size for block, size in taken.items() if block not in gone)
    assert stay == step.weights.trained, "what was recomputed last is freed with the recipes"
    assert gone <= taken.keys(), "an empty tensor is no block"


def test_a_classifier_of_a_language_models_kind_can_be_foreseen():
    """transformers gives it a cache, which begins with empty tensors."""
    base = _base("llama")._replace(kind="classification")
    step = trace_step(base, LORA, _rows("classification"))
    taken = {event.block for stretch in step.stretches for event in stretch.events if event.size}
    assert {event.block for stretch in step.stretches for event in stretch.events} == taken


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_in_bf16_the_activations_take_half(storage):
    update = veneer.LoRA(rank=3, train_also=["norm"])
    kept = []
    for compute in (torch.float32, torch.bfloat16):
        step = trace_step(_base("llama", storage, compute), update, _rows())
        kept.append(_live([stretch for stretch in step.forward() if stretch.name == "forward"]))
    room = 32 * 64  # values of the largest matrix, expanded
    assert kept[1] < 0.6 * (kept[0] + 2 * room)
