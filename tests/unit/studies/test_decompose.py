"""Updates and changes by their singular values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
import veneer
from veneer.frozen.layers import linear_layers
from veneer.runs.opened import open_run
from veneer.studies.decompose import Changes, of_product, overlap, truncate
from veneer.updates.layers import Pair
from veneer.updates.record import updates_of

pytestmark = pytest.mark.unit


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_a_product_is_decomposed_without_being_formed(rank, out, inside, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, out, inside)
    B, A = torch.randn(out, rank, generator=generator), torch.randn(rank, inside, generator=generator)
    U, S, V = of_product(B, A)
    torch.testing.assert_close((U * S) @ V, B.double() @ A.double())
    torch.testing.assert_close(U.T @ U, torch.eye(rank).double())
    torch.testing.assert_close(V @ V.T, torch.eye(rank).double())
    assert bool((S[:-1] >= S[1:]).all())


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_cut_update_is_the_nearest_of_its_rank(rank):
    torch.manual_seed(0)
    update = Pair(torch.randn(5, 12), torch.randn(9, 5), scale=0.5)
    whole = update.delta(torch.float64)
    decomposed = of_product(update.B, update.A)
    truncate(update, *decomposed, rank)
    found = update.delta(torch.float64)
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == rank
    U, S, V = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(found, (U[:, :rank] * S[:rank]) @ V[:rank], rtol=1e-5, atol=1e-5)
    truncate(update, *decomposed, 5)  # from the same parts again, so that no cut stands on another
    torch.testing.assert_close(update.delta(torch.float64), whole, rtol=1e-5, atol=1e-5)


def test_the_parts_of_what_changed():
    before, after = tiny.build("llama"), tiny.build("llama", seed=1)
    names = linear_layers(before)
    start = tiny.state(before)
    changes = Changes(before, after, names, most=4)
    changes.put(2)
    for name in names:
        difference = before.get_parameter(f"{name}.weight") - start[f"{name}.weight"]
        assert torch.linalg.matrix_rank(difference, rtol=1e-4) == 2
        lost = after.state_dict()[f"{name}.weight"] - before.state_dict()[f"{name}.weight"]
        whole = after.state_dict()[f"{name}.weight"] - start[f"{name}.weight"]
        assert changes.energy(name, 2) == pytest.approx(1 - float(lost.square().sum() / whole.square().sum()), abs=1e-5)
    changes.put(None)
    assert all(torch.equal(before.get_parameter(f"{n}.weight"), after.get_parameter(f"{n}.weight")) for n in names)
    assert torch.equal(before.lm_head.weight, start["lm_head.weight"]), "and nothing else"
    changes.put(0)
    assert tiny.same_state(before, start)


def test_what_did_not_change_is_all_in_any_part():
    model = tiny.build("llama")
    assert Changes(model, tiny.build("llama"), linear_layers(model), 2).energy("model.layers.0.mlp.up_proj", 1) == 1


def test_overlap_of_the_same_of_orthogonal_and_of_random_spans():
    whole, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    turned, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert overlap(whole[:, :8], whole[:, :8] @ turned, 8) == pytest.approx(1)
    assert overlap(whole[:, :8], whole[:, 8:16], 8) == pytest.approx(0)
    spans = [torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(s)))[0] for s in range(40)]
    mean = sum(overlap(one, other, 8) for one, other in zip(spans[::2], spans[1::2], strict=True)) / 20
    assert mean == pytest.approx(8 / 64, rel=0.15)


def test_a_loaded_adapter_can_be_cut(finished_run):
    prepared = open_run(finished_run)
    updates = [update for update in updates_of(prepared.model, "default").values() if isinstance(update, Pair)]
    assert len(updates) == 14
    for update in updates:
        truncate(update, *of_product(update.B, update.A), 2)
        assert torch.linalg.matrix_rank(update.delta(torch.float64), rtol=1e-4) <= 2
    assert veneer.trainable(prepared.model).rows == []
