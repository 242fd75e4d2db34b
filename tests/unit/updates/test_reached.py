"""Updates that nothing trains are named, in any loop, and those that train are not."""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref

import pytest
import torch
from torch import nn

import tiny
import veneer

pytestmark = pytest.mark.unit

LORA = veneer.LoRA(rank=2)
ADALORA = veneer.AdaLoRA(initial_rank=3, target_rank=2, total_steps=10)


class Half(nn.Module):
    """Two linear layers, of which one is never called."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


def _said(function, *arguments):
    """The sentences of Veneer's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments)
    return [str(warning.message) for warning in caught if issubclass(warning.category, veneer.VeneerWarning)]


def _backward(model):
    loss = model(torch.ones(2, 8)).pow(2).sum()
    loss.backward()
    return loss


def _train(model, optimizer):
    for _ in range(2):
        optimizer.zero_grad()
        _backward(model)
        optimizer.step()


def _optimizer(model, kind=torch.optim.AdamW):
    return kind([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)


@pytest.mark.parametrize("config", [LORA, ADALORA])
def test_a_dead_update_is_named_after_the_first_step_and_when_it_is_saved(config, tmp_path):
    model = veneer.attach(Half(), config)
    (said,) = _said(_train, model, _optimizer(model))
    assert said.startswith("1 of the 2 updates of the adapter 'default' got no gradient in the first step: unused. ")
    (said,) = _said(veneer.save, model, tmp_path)
    assert said.startswith("1 of the 2 updates of the adapter 'default' never got a gradient and learned nothing: unu")


def test_a_copy_of_the_model_listens_too():
    model = copy.deepcopy(veneer.attach(Half(), LORA))
    (said,) = _said(_train, model, _optimizer(model))
    assert "no gradient in the first step: unused." in said


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.LBFGS])
@pytest.mark.parametrize("config", [LORA, ADALORA])
def test_nothing_is_said_of_what_trains(config, kind, tmp_path):
    model = veneer.attach(Half(), config.model_copy(update={"targets": ["used"]}))
    optimizer = _optimizer(model, kind)

    def trained():
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.step(lambda: _backward(model))
        veneer.save(model, tmp_path)

    assert _said(trained) == []


@pytest.mark.parametrize("config", [LORA, ADALORA])
def test_an_optimizer_made_before_attach_is_named(config, tmp_path):
    model = Half()
    optimizer = torch.optim.AdamW(model.parameters())
    veneer.attach(model, config.model_copy(update={"targets": ["used"]}))
    (said,) = _said(_train, model, optimizer)
    assert said.startswith("The optimizer holds parameters of the frozen model and none of the adapter 'default'")
    assert "make it after attach" in said
    assert _said(veneer.save, model, tmp_path) == [said]


def test_an_optimizer_that_holds_a_part_is_named_when_the_adapter_is_saved(tmp_path):
    model = veneer.attach(tiny.build("llama"), veneer.LoRA(rank=2, targets=["q_proj"]))
    second = model.model.layers[1].self_attn.q_proj
    optimizer = torch.optim.AdamW([*second.updates.parameters()])

    def trained():
        model(**tiny.batch("llama")).loss.backward()
        optimizer.step()

    assert _said(trained) == []
    (said,) = _said(veneer.save, model, tmp_path)
    assert "1 of the 2 updates of the adapter 'default' got gradients, but no optimizer's step changed them" in said
    assert "model.layers.0.self_attn.q_proj" in said


def test_a_step_without_any_gradient_is_none():
    model = veneer.attach(Half(), LORA)
    optimizer = _optimizer(model)
    assert _said(optimizer.step) == []
    (said,) = _said(_train, model, optimizer)
    assert "no gradient in the first step: unused." in said


def test_a_loop_without_an_optimizer_of_torch_is_seen_when_the_adapter_is_saved(tmp_path):
    model = veneer.attach(Half(), LORA)
    _backward(model)
    model.zero_grad()
    (said,) = _said(veneer.save, model, tmp_path)
    assert "never got a gradient and learned nothing: unused." in said


def test_nothing_is_said_of_adapters_that_nobody_trained(tmp_path):
    model = veneer.attach(Half(), LORA)
    assert _said(veneer.save, model, tmp_path / "a") == []
    other = Half()
    assert _said(veneer.load_adapter, other, tmp_path / "a") == []
    assert _said(veneer.save, other, tmp_path / "b") == []
    bystander = Half()
    assert _said(_train, bystander, torch.optim.AdamW(bystander.parameters())) == []


def test_what_listens_keeps_no_model():
    model = veneer.attach(Half(), LORA)
    reference, enabled = weakref.ref(model), gc.isenabled()
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        if enabled:
            gc.enable()


def test_a_run_says_it_in_its_first_step_and_at_its_end(tiny_folder, rows_file, tmp_path, capsys):
    from rich.console import Console

    model, tokenizer = veneer.load(tiny_folder)
    model.model.unused = nn.Linear(32, 32)
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj", "unused"]))
    result = veneer.train(model, tokenizer, data=str(rows_file), output=str(tmp_path / "run"), steps=2,
                          console=Console(width=80))  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of the 3 updates of the adapter 'default' got no gradient in the first step" in printed
    assert "1 of the 3 updates of the adapter 'default' never got a gradient" in result.advice[0]
    assert "model.unused" in json.loads((tmp_path / "run" / "advice.json").read_text())["advice"][0]
