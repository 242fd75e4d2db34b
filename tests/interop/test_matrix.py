"""LoRA and AdaLoRA on every architecture of `architectures`: zero update, steps, file, merge, and peft both ways."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import architectures
import tiny
import veneer

pytestmark = pytest.mark.interop

METHODS = {
    "LoRA": veneer.LoRA(rank=4, alpha=8),
    "AdaLoRA": veneer.AdaLoRA(initial_rank=3, target_rank=2, total_steps=20, alpha=6),
}
# What all-linear cannot take, and names.
_READ = "the module around it reads its weight itself"
LEFT_OUT = {
    "phimoe": "a PhimoeTopKRouter, which cannot be adapted",
    "torch": "a NonDynamicallyQuantizableLinear, which cannot be adapted",
    "mamba": _READ, "falcon-mamba": _READ, "jamba": _READ,
    "mamba2": _READ,  # its output projection, by the kernels for a GPU
}  # fmt: skip
# Where peft does not take the adapter, or writes none: what it raises.
PEFT_REFUSES = {
    "mamba": "Module 'out_proj' is incompatible with Mamba-based models",
    "falcon-mamba": "Module 'out_proj' is incompatible with Mamba-based models",
    "wav2vec2": "`get_input_embeddings` not auto",
    # It takes the names of the dense and shared layers as the experts' and drops their tensors.
    "deepseek-v3 LoRA": "Tensor-likes are not close",
}


def _close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return architectures.output(model, inputs)


def _steps(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """A few steps in eval mode, so that nothing is dropped."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        architectures.output(model, inputs).float().pow(2).mean().backward()
        optimizer.step()


def _life(base: Any, inputs: dict[str, torch.Tensor], method: str, folder: Path) -> tuple[torch.Tensor, list[str]]:
    """What the trained adapter computes, and what was said on the way."""
    model, before = copy.deepcopy(base), _output(base, inputs)
    state = tiny.state(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", veneer.VeneerWarning)
        veneer.attach(model, METHODS[method])
        _close(_output(model, inputs), before)
        _steps(model, inputs)
        adapted = _output(model, inputs)
        assert (adapted - before).abs().max() > 1e-4, "trained"
        veneer.save(model, folder / "ours")
    other = copy.deepcopy(base)
    veneer.load_adapter(other, folder / "ours")
    assert torch.equal(_output(other, inputs), adapted), "reloaded"
    veneer.merge(model)
    _close(_output(model, inputs), adapted)
    veneer.unmerge(model)
    assert torch.equal(_output(model, inputs), adapted), "unmerged"
    veneer.remove(model)
    assert tiny.same_state(model, state), "removed"
    assert torch.equal(_output(model, inputs), before), "and so is what it computes"
    return adapted, [str(w.message) for w in caught if issubclass(w.category, veneer.VeneerWarning)]


def _exchanged(base: Any, inputs: dict[str, torch.Tensor], adapted: torch.Tensor, folder: Path, train: bool) -> None:
    """peft reads the folder, and what peft writes is read here. ``train``: where peft's adapters are out of force in
    eval mode."""
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours").train(train)
    _close(_output(theirs, inputs), adapted)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.add_(0.02)
    theirs.save_pretrained(folder / "theirs")
    ours = copy.deepcopy(base)
    veneer.load_adapter(ours, folder / "theirs")
    _close(_output(ours, inputs), _output(theirs, inputs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", architectures.NAMES)
def test_an_architecture(name, method, tmp_path):
    base, inputs = architectures.made(name)
    adapted, said = _life(base, inputs, method, tmp_path)
    expected = LEFT_OUT.get(name)
    assert [sentence.startswith("all-linear leaves out ") and str(expected) in sentence for sentence in said] == (
        [True] if expected else []
    ), said
    refused = PEFT_REFUSES.get(name) or PEFT_REFUSES.get(f"{name} {method}")
    if refused is None:
        _exchanged(base, inputs, adapted, tmp_path, train=name == "torch")
    else:
        with pytest.raises((ValueError, NotImplementedError, AssertionError), match=refused):
            _exchanged(base, inputs, adapted, tmp_path, train=False)
