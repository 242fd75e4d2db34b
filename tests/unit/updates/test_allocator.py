"""The allocator inside other people's loops: it cannot be forgotten, and counts the steps that count."""

from __future__ import annotations

import copy
import gc
import math
import pickle

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from torch import nn

import tiny
import veneer
from veneer.errors import ConfigError, TargetError, TrainingError
from veneer.training.paged_adamw import PagedAdamW

pytestmark = pytest.mark.unit

TOTAL, LAST = 8, 6  # ranks are taken in steps 2 to 6


def _attached(name="llama", total=TOTAL, dtype=torch.float32, **options):
    model = tiny.build(name).to(dtype)
    settings = {"initial_rank": 4, "target_rank": 2, "total_steps": total, "tinit": 1, "tfinal": 2, **options}
    torch.manual_seed(0)
    veneer.attach(model, veneer.AdaLoRA(**settings))
    return model, veneer.allocator(model)


def _trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _loss(model, seed=0, name="llama"):
    return model(**tiny.batch(name, seed=seed)).loss


def _steps(model, optimizer, count, name="llama"):
    for step in range(count):
        optimizer.zero_grad()
        _loss(model, step, name).backward()
        optimizer.step()


def _total(allocator):
    return sum(update.rank for update in allocator.triplets.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_a_foreign_loop_allocates_without_a_call(name):
    model, allocator = _attached(name)
    inputs = tiny.batch(name)
    plain = tiny.logits(tiny.build(name), inputs)
    assert torch.equal(tiny.logits(model, inputs), plain), "λ starts at zero"
    _steps(model, torch.optim.AdamW(_trained(model), lr=0.02), LAST, name)
    assert allocator.fixed
    assert _total(allocator) == 2 * len(allocator.triplets) == allocator.budget
    assert allocator.ranks() == {path: update.rank for path, update in allocator.triplets.items()}
    assert not torch.equal(tiny.logits(model, inputs), plain)


def test_the_hugging_face_trainer_allocates(tmp_path):
    model, allocator = _attached()
    rows = [{name: value[0] for name, value in tiny.batch("llama", rows=1, seed=seed).items()} for seed in range(16)]
    arguments = tf.TrainingArguments(
        str(tmp_path), max_steps=TOTAL, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        save_strategy="no", use_cpu=True, learning_rate=0.02, disable_tqdm=True,
    )  # fmt: skip
    tf.Trainer(model, arguments, train_dataset=rows).train()
    assert (allocator.step, allocator.fixed) == (TOTAL, True)
    assert _total(allocator) == 2 * len(allocator.triplets)


def test_an_accelerate_loop_allocates():
    model, allocator = _attached()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(_trained(model), lr=0.02))
    for step in range(2 * TOTAL):
        with accelerator.accumulate(prepared):
            accelerator.backward(_loss(prepared, step))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert (allocator.step, allocator.fixed) == (TOTAL, True)
    assert _total(allocator) == 2 * len(allocator.triplets)


def test_accumulated_gradients_are_one_step():
    whole, whole_allocator = _attached()
    parts, parts_allocator = _attached()
    for model, sizes in ((whole, [4]), (parts, [1, 2, 1])):
        optimizer = torch.optim.AdamW(_trained(model), lr=0.02)
        for step in range(LAST):
            optimizer.zero_grad()
            inputs = tiny.batch("llama", rows=4, seed=step)
            for rows in zip(*(value.split(sizes) for value in inputs.values()), strict=True):
                part = dict(zip(inputs, rows, strict=True))
                (model(**part).loss * len(rows[0]) / 4).backward()
            optimizer.step()
    assert torch.equal(whole_allocator.kept, parts_allocator.kept)
    assert parts_allocator.step == LAST


@pytest.mark.parametrize("maker", [torch.optim.AdamW, lambda p, **o: torch.optim.AdamW(p, fused=True, **o)])
def test_a_loss_scaler_changes_nothing_and_a_skipped_step_does_not_count(maker):
    """torch's fused optimizers unscale and skip by themselves, the others are not called at all."""
    plain, plain_allocator = _attached()
    scaled, allocator = _attached()
    optimizer = maker(_trained(plain), lr=0.02)
    _steps(plain, optimizer, 4)
    optimizer = maker(_trained(scaled), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = 0
    for attempt in range(5):
        optimizer.zero_grad()
        loss = scaler.scale(_loss(scaled, step))
        loss.backward()
        if attempt == 2:
            next(iter(allocator.triplets.values())).P.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        step += attempt != 2
    assert allocator.step == 4
    torch.testing.assert_close(allocator._importance.scores(), plain_allocator._importance.scores(), rtol=1e-3, atol=0)
    assert torch.equal(allocator.kept, plain_allocator.kept)
    for ours, theirs in zip(_trained(scaled), _trained(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keyword", [True, False])
def test_gradients_that_come_in_a_closure_are_seen(keyword):
    plain, plain_allocator = _attached()
    _steps(plain, torch.optim.AdamW(_trained(plain), lr=0.02), LAST)
    model, allocator = _attached()
    optimizer = torch.optim.AdamW(_trained(model), lr=0.02)
    for step in range(LAST):

        def closure(step=step):
            optimizer.zero_grad()
            loss = _loss(model, step)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss > 0
    assert torch.equal(allocator.kept, plain_allocator.kept)
    assert all(torch.equal(a, b) for a, b in zip(_trained(model), _trained(plain), strict=True))


def test_a_step_without_gradients_does_not_count():
    model, allocator = _attached()
    optimizer = torch.optim.AdamW(_trained(model), lr=0.02)
    optimizer.step()
    assert allocator.step == 0
    torch.optim.AdamW(nn.Linear(2, 2).parameters()).step()
    assert allocator.step == 0


def test_a_matrix_that_a_step_does_not_reach_has_no_sensitivity():
    model, allocator = _attached(orthogonality=0.0)
    with torch.no_grad():
        for update in allocator.triplets.values():
            update.lam.fill_(0.1)
    optimizer = torch.optim.AdamW(_trained(model), lr=0.02)
    _loss(model).backward()
    first = next(iter(allocator.triplets.values()))
    first.P.grad = first.lam.grad = first.Q.grad = None
    optimizer.step()
    assert allocator._importance.scores()[0].eq(0).all()
    assert allocator._importance.scores()[1].gt(0).all()
    assert not optimizer.state[first.lam]


def test_half_precision_parameters_and_autocast():
    model, allocator = _attached()
    optimizer = torch.optim.AdamW(_trained(model), lr=0.02)
    for step in range(LAST):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, step)
        loss.backward()
        optimizer.step()
    assert _total(allocator) == 2 * len(allocator.triplets)
    model, allocator = _attached()
    model.to(torch.bfloat16)
    _steps(model, torch.optim.AdamW(_trained(model), lr=0.02), LAST)
    assert {p.dtype for p in _trained(model)} == {torch.bfloat16}
    assert _total(allocator) == 2 * len(allocator.triplets)


def test_several_groups_of_one_optimizer():
    model, allocator = _attached()
    values = [update.lam for update in allocator.triplets.values()]
    others = [p for p in _trained(model) if all(p is not value for value in values)]
    optimizer = torch.optim.AdamW([{"params": values, "lr": 0.05}, {"params": others, "weight_decay": 0.1}], lr=0.01)
    _steps(model, optimizer, TOTAL)
    assert _total(allocator) == 2 * len(allocator.triplets)


def test_two_optimizers_are_refused():
    model, allocator = _attached()
    first = torch.optim.AdamW(_trained(model), lr=0.02)
    _steps(model, first, 1)
    second = torch.optim.SGD(_trained(model), lr=0.02)
    _loss(model).backward()
    before = tiny.state(model)
    with pytest.raises(TrainingError, match="A second optimizer steps the parameters of an AdaLoRA adapter"):
        second.step()
    assert tiny.same_state(model, before)
    del first
    gc.collect()
    second.step()
    assert allocator.step == 2
    half = torch.optim.SGD(_trained(model)[::2], lr=0.02)
    with pytest.raises(TrainingError, match=r"holds \d+ of the 42 parameters of an AdaLoRA adapter.*give all of them"):
        half.step()


@pytest.mark.parametrize(
    "maker",
    [
        lambda p, _: torch.optim.AdamW(p, lr=0.02),
        lambda p, _: torch.optim.AdamW(p, lr=0.02, fused=True, amsgrad=True),
        lambda p, _: torch.optim.SGD(p, lr=0.02, momentum=0.9),
        lambda p, _: torch.optim.RMSprop(p, lr=0.02, centered=True),
        lambda p, _: torch.optim.Adafactor(p, lr=0.02),
        lambda p, folder: PagedAdamW(p, lr=0.02, folder=folder, resident="1MB", page_size=65536),
    ],
    ids=["adamw", "amsgrad", "momentum", "rmsprop", "adafactor", "paged"],
)
def test_the_cut_changes_neither_the_loss_nor_the_next_step(maker, tmp_path, monkeypatch):
    """Beside a model in which the masked triplets are kept, with λ held at zero, as the peers do it; in float64."""
    model, _ = _attached(orthogonality=0.0, dtype=torch.float64)
    masked, masked_allocator = _attached(orthogonality=0.0, dtype=torch.float64)
    inputs = tiny.batch("llama", seed=9)
    monkeypatch.setattr(masked_allocator, "fix", lambda kept, optimizer: masked_allocator._mask())
    optimizer, other = maker(_trained(model), tmp_path), maker(_trained(masked), tmp_path)
    _steps(model, optimizer, LAST)
    _steps(masked, other, LAST)
    sizes = [p.numel() for p in _trained(model)], [p.numel() for p in _trained(masked)]
    assert sum(sizes[0]) == pytest.approx(sum(sizes[1]) / 2, rel=0.2)
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(masked, inputs), rtol=0, atol=1e-9)
    for _ in range(2):
        for one, its in ((model, optimizer), (masked, other)):
            its.zero_grad()
            _loss(one, 7).backward()
            its.step()
        masked_allocator._mask()
        if isinstance(optimizer, torch.optim.Adafactor):
            break  # whose update is scaled by the size of the whole parameter
        torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(masked, inputs), rtol=0, atol=1e-9)
    if isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD):
        for parameter, state in optimizer.state.items():
            for value in state.values():
                assert not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape == parameter.shape


def test_the_paged_optimizer_takes_the_same_bits_after_the_cut(tmp_path):
    whole, _ = _attached()
    paged, allocator = _attached()
    one = torch.optim.AdamW(_trained(whole), lr=0.02, fused=True)
    other = PagedAdamW(_trained(paged), lr=0.02, weight_decay=1e-2, folder=tmp_path, resident="1MB", page_size=65536)
    _steps(whole, one, TOTAL)
    _steps(paged, other, TOTAL)
    assert allocator.fixed
    assert all(torch.equal(a, b) for a, b in zip(_trained(whole), _trained(paged), strict=True))
    for a, b in zip(_trained(whole), _trained(paged), strict=True):
        if b.numel():
            assert torch.equal(one.state[a]["exp_avg_sq"], other.moment(b, "exp_avg_sq"))


def test_a_loss_that_is_still_held_does_not_hold_the_old_shapes():
    model, allocator = _attached()
    optimizer = torch.optim.AdamW(_trained(model), lr=0.02)
    held = []
    for step in range(TOTAL):
        optimizer.zero_grad()
        held.append(_loss(model, step))
        held[-1].backward()
        optimizer.step()
    assert allocator.step == TOTAL


def test_states_that_cannot_be_cut_start_anew_and_are_told_of():
    class Strange(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["blocks"] = torch.ones(7)

    model, allocator = _attached()
    optimizer = Strange(_trained(model), lr=0.02)
    with pytest.warns(UserWarning, match="Strange keeps its states in a form that cannot be cut"):
        _steps(model, optimizer, LAST)
    assert allocator.fixed
    _steps(model, optimizer, 1)


def test_a_matrix_of_rank_0_trains_saves_and_merges(tmp_path):
    model, allocator = _attached()
    optimizer = torch.optim.AdamW(_trained(model), lr=0.02)
    _steps(model, optimizer, 2)
    kept = allocator.kept.clone()
    kept[0] = False
    allocator.fix(kept, optimizer)
    _steps(model, optimizer, 2)
    inputs = tiny.batch("llama")
    adapted = tiny.logits(model, inputs)
    veneer.save(model, tmp_path / "a")
    again = tiny.build("llama")
    veneer.load_adapter(again, tmp_path / "a")
    assert torch.equal(tiny.logits(again, inputs), adapted)
    assert veneer.allocator(again).ranks() == allocator.ranks()
    veneer.merge(model)
    torch.testing.assert_close(tiny.logits(model, inputs), adapted, rtol=1e-4, atol=1e-5)
    veneer.unmerge(model)
    assert torch.equal(tiny.logits(model, inputs), adapted)


def test_the_initial_rank_may_be_the_target():
    model, allocator = _attached(initial_rank=3, target_rank=3)
    _steps(model, torch.optim.AdamW(_trained(model), lr=0.02), TOTAL)
    assert allocator.fixed
    assert set(allocator.ranks().values()) == {3}


@pytest.mark.parametrize("final", [0, 2])
def test_the_budget_is_met_at_the_end_whatever_the_interval(final):
    model, allocator = _attached(delta_t=5, tfinal=final)
    _steps(model, torch.optim.AdamW(_trained(model), lr=0.02), TOTAL)
    assert _total(allocator) == 2 * len(allocator.triplets)


def test_an_evaluation_loss_has_no_regulariser():
    model, _ = _attached(orthogonality=10.0)
    veneer.activate(model)
    plain = _loss(model)
    veneer.activate(model, "default")
    assert torch.equal(_loss(model), plain)


def test_the_deviation_falls_when_orthogonality_is_asked_for():
    found = []
    for weight in (0.0, 0.5):
        model, allocator = _attached(orthogonality=weight, total=40)
        _steps(model, torch.optim.AdamW(_trained(model), lr=0.02), 30)
        found.append(float(allocator.deviation))
    assert found[1] < 0.5 * found[0]


@pytest.mark.parametrize(
    ("budget", "expected"), [("2000", 2000), ("0.002M", 2000), ("5%", None), ("0.05", None)]
)  # fmt: skip
def test_a_budget_in_parameters_or_as_a_share(budget, expected):
    model = tiny.build("llama")
    base = veneer.trainable(model).base_parameters
    veneer.attach(model, veneer.AdaLoRA(budget=budget, total_steps=10, targets=["q_proj", "o_proj"]))
    allocator = veneer.allocator(model)
    size = 32 + 32 + 1
    assert allocator.schedule.target == (expected or int(0.05 * base))
    assert allocator.config.initial_rank == math.ceil(1.5 * allocator.schedule.target / (size * 4))
    _steps(model, torch.optim.AdamW(_trained(model), lr=0.02), 10)
    assert veneer.trainable(model).parameters == allocator.schedule.target // size * size


def test_a_budget_of_parameters_is_met_where_matrices_differ_in_size():
    model, allocator = _attached(budget="3000", target_rank=8, initial_rank=5)
    _steps(model, torch.optim.AdamW(_trained(model), lr=0.02), TOTAL)
    assert allocator.budget == 3000
    assert 3000 - 81 < veneer.trainable(model).parameters <= 3000


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"total_steps": None}, ConfigError, "AdaLoRA needs total_steps, the number of optimizer steps"),
        ({"budget": "10", "target_rank": 8}, ConfigError, "budget = 10 is less than one triplet of the 14 adapted"),
        ({"budget": "50%", "target_rank": 8}, ConfigError, "more than initial_rank = 4; ranks are only taken away"),
        ({"target_rank": 5}, ConfigError, "initial_rank = 4 is less than target_rank = 5; ranks are only taken away"),
        ({"tinit": 6}, ConfigError, "tinit = 6 and tfinal = 2 leave none of the 8 steps in which ranks could be"),
        ({"targets": [], "train_also": ["lm_head"]}, ConfigError, "AdaLoRA has no targets, so there are no ranks"),
        ({"targets": ["embed_tokens"]}, TargetError, "embed_tokens is an Embedding, which AdaLoRA does not adapt"),
        ({"initial_rnak": 4}, ConfigError, "AdaLoRA has no option 'initial_rnak'. Did you mean 'initial_rank'"),
    ],
)
def test_refusals_leave_the_model_as_it_was(options, error, match):
    model = tiny.build("llama")
    before = tiny.state(model)
    settings = {"initial_rank": 4, "target_rank": 2, "total_steps": TOTAL, "tfinal": 2, **options}
    with pytest.raises(error, match=match):
        veneer.attach(model, veneer.AdaLoRA(**settings))
    assert tiny.same_state(model, before)
    with pytest.raises(TargetError, match="No one adapter is active"):
        veneer.allocator(model)


def test_a_lora_adapter_has_no_allocator():
    model, _ = _attached()
    veneer.attach(model, veneer.LoRA(), "plain")
    with pytest.raises(TargetError, match="'plain' is no AdaLoRA adapter; of the attached ones these are: default"):
        veneer.allocator(model)
    assert veneer.allocator(model, "default").step == 0
    veneer.remove(model, "default")
    with pytest.raises(TargetError, match="'default' is no AdaLoRA adapter"):
        veneer.allocator(model, "default")


def test_copies_and_pickles_allocate_by_themselves():
    model, allocator = _attached()
    optimizer = torch.optim.AdamW(_trained(model), lr=0.02)
    _steps(model, optimizer, 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        its = veneer.allocator(other)
        _steps(other, torch.optim.AdamW(_trained(other), lr=0.02), LAST - 2)
        assert (its.step, its.fixed, allocator.step) == (LAST, True, 2)


def test_a_state_goes_into_another_process():
    """As a foreign loop would save it: the adapter's tensors, the optimizer's state, the allocator's."""
    whole, _ = _attached()
    _steps(whole, torch.optim.AdamW(_trained(whole), lr=0.02), TOTAL)
    for stop in (1, 4, 7):
        model, allocator = _attached()
        optimizer = torch.optim.AdamW(_trained(model), lr=0.02)
        _steps(model, optimizer, stop)
        saved = copy.deepcopy(([p.detach() for p in _trained(model)], optimizer.state_dict(), allocator.state_dict()))
        again, its = _attached()
        optimizer = torch.optim.AdamW(_trained(again), lr=0.02)
        its.load_state_dict(saved[2], optimizer)
        with torch.no_grad():
            for mine, value in zip(_trained(again), saved[0], strict=True):
                mine.copy_(value)
        optimizer.load_state_dict(saved[1])
        for step in range(stop, TOTAL):
            optimizer.zero_grad()
            _loss(again, step).backward()
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(_trained(again), _trained(whole), strict=True)), stop
