"""A model in memory whose passes are counted."""

from __future__ import annotations

import pytest
import torch

import veneer


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    model, tokenizer = veneer.load(tiny_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # the answers of a fresh model are all alike
    return model, tokenizer


@pytest.fixture
def passed(loaded):
    """The number of rows of each pass through the model, as it is predicted with."""
    counts: list[int] = []
    hook = loaded[0].register_forward_pre_hook(
        lambda module, given, named: counts.append(len(named["input_ids"])), with_kwargs=True
    )
    yield counts
    hook.remove()
