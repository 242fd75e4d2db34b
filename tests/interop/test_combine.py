"""Adapters combined: the exact weighted sum of their full updates, and peft's own where peft is right."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.utils import merge_utils

import tiny
import veneer
from veneer.errors import AdapterFileError, ArgumentError, ConfigError
from veneer.updates.combine import agreed, largest, random_share
from veneer.updates.export import plain_updates

pytestmark = pytest.mark.interop

_WEIGHTS = [0.7, -0.4]


def _adapter(folder, seed, **options):
    model, inputs = tiny.build("llama"), tiny.batch("llama", seed=seed)
    config = veneer.AdaLoRA(**options) if "total_steps" in options else veneer.LoRA(**options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        veneer.attach(model, config)
        tiny.train_steps(model, inputs, steps=6)
    veneer.save(model, folder)
    return folder


@pytest.fixture
def alike(tmp_path):
    """Two adapters of one rank and scale, over some of the same modules."""
    return [
        _adapter(tmp_path / "a", 1, rank=4, alpha=6, targets=["q_proj", "v_proj"]),
        _adapter(tmp_path / "b", 2, rank=4, alpha=2, targets=["q_proj", "embed_tokens"]),
    ]


@pytest.fixture
def unlike(tmp_path):
    return [
        _adapter(tmp_path / "a", 1, rank=4, alpha=6, rslora=True, targets=["q_proj", "v_proj"]),
        _adapter(tmp_path / "b", 2, rank=3, targets=["q_proj", "embed_tokens"], rank_pattern={"q_proj": 2},
                 alpha_pattern={"1.self_attn.q_proj": 5}),
        _adapter(tmp_path / "c", 3, target_rank=2, initial_rank=4, total_steps=6, tinit=1, tfinal=2,
                 targets=["q_proj", "down_proj"]),
    ]  # fmt: skip


def _weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _merged(folder):
    model = tiny.build("llama")
    veneer.load_adapter(model, folder)
    veneer.merge(model, reversible=False)
    return _weights_of(model)


def _sum(folders, weights):
    """W0 + Σ wᵢ ΔWᵢ, with everything formed."""
    base, merged = _weights_of(tiny.build("llama")), [_merged(folder) for folder in folders]
    return {k: v + sum(w * (m[k] - v) for w, m in zip(weights, merged, strict=True)) for k, v in base.items()}


def _peft(folders, weights, **how):
    model = peft.PeftModel.from_pretrained(tiny.build("llama"), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    model.add_weighted_adapter([str(n) for n in range(len(folders))], weights, "mixed", **how)
    model.set_adapter("mixed")
    return model.eval()


@pytest.mark.parametrize("padded", [True, False])
def test_cat_is_the_exact_sum_of_any_adapters(unlike, padded, tmp_path):
    weights = [0.5, -0.25, 1.5]
    veneer.combine(unlike, weights, tmp_path / "mixed", padded=padded)
    expected = _sum(unlike, weights)
    for name, weight in _merged(tmp_path / "mixed").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6, msg=name)
    inputs, ours = tiny.batch("llama"), tiny.build("llama")
    veneer.load_adapter(ours, tmp_path / "mixed")
    theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "mixed").eval()
    torch.testing.assert_close(tiny.logits(ours, inputs), tiny.logits(theirs, inputs), rtol=0, atol=1e-6)


def test_svd_is_the_nearest_of_its_rank(unlike, tmp_path):
    weights = [0.5, -0.25, 1.5]
    veneer.combine(unlike, weights, tmp_path / "mixed", how="svd", rank=3)
    exact, found, base = _sum(unlike, weights), _merged(tmp_path / "mixed"), _weights_of(tiny.build("llama"))
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        delta = (exact[name] - base[name]).double()
        U, S, V = torch.linalg.svd(delta, full_matrices=False)
        nearest = U[:, :3] * S[:3] @ V[:3]
        torch.testing.assert_close((found[name] - base[name]).double(), nearest, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"how": "cat"}, {"combination_type": "cat"}),
        ({"how": "svd", "rank": 3}, {"combination_type": "svd", "svd_rank": 3}),
        ({"how": "linear"}, {"combination_type": "linear"}),
        ({"how": "ties", "density": 0.3}, {"combination_type": "ties_svd", "density": 0.3}),
        ({"how": "ties", "density": 1.0, "rank": 2}, {"combination_type": "ties_svd", "density": 1.0, "svd_rank": 2}),
        ({"how": "dare_ties", "density": 1.0}, {"combination_type": "dare_ties_svd", "density": 1.0}),
    ],
)
def test_where_peft_is_right_it_is_pefts(alike, ours, theirs, tmp_path):
    veneer.combine(alike, _WEIGHTS, tmp_path / "mixed", **ours)
    model, inputs = tiny.build("llama"), tiny.batch("llama")
    veneer.load_adapter(model, tmp_path / "mixed")
    torch.testing.assert_close(
        tiny.logits(model, inputs), tiny.logits(_peft(alike, _WEIGHTS, **theirs), inputs), rtol=0, atol=5e-6
    )


def test_with_rslora_peft_is_wrong_and_the_sum_is_right_here(tmp_path):
    folders = [_adapter(tmp_path / name, seed, rank=4, rslora=True) for seed, name in enumerate("ab")]
    veneer.combine(folders, _WEIGHTS, tmp_path / "mixed")
    expected, inputs = tiny.build("llama"), tiny.batch("llama")
    expected.load_state_dict(_sum(folders, _WEIGHTS), strict=False)
    ours = tiny.build("llama")
    veneer.load_adapter(ours, tmp_path / "mixed")
    right = tiny.logits(expected, inputs)
    torch.testing.assert_close(tiny.logits(ours, inputs), right, rtol=0, atol=5e-6)
    theirs = tiny.logits(_peft(folders, _WEIGHTS, combination_type="cat"), inputs)
    assert (theirs - right).abs().max() > 0.1, "peft keeps use_rslora and gives the new adapter alpha = rank"


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_shares_and_signs_are_pefts(density):
    torch.manual_seed(0)
    deltas, weights = [torch.randn(12, 7) for _ in range(3)], torch.tensor([0.5, -1.0, 2.0])
    shaped = weights[:, None, None]
    kept = torch.stack([largest(delta, density) for delta in deltas])
    torch.testing.assert_close(agreed(kept, shaped), merge_utils.ties(deltas, weights, density))
    for name, total in (
        ("dare_linear", lambda kept: (kept * shaped).sum(0)),
        ("dare_ties", lambda k: agreed(k, shaped)),
    ):
        torch.manual_seed(5)
        theirs = getattr(merge_utils, name)(deltas, weights, density)
        generator = torch.Generator().manual_seed(5)
        ours = total(torch.stack([random_share(delta, density, generator) for delta in deltas]))
        torch.testing.assert_close(ours, theirs)


def test_the_same_seed_is_the_same_adapter(alike, tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        veneer.combine(alike, _WEIGHTS, tmp_path / name, how="dare_linear", density=0.5, seed=seed)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert files[0] == files[1] != files[2]
    assert max(len(one.A) for one in plain_updates(tmp_path / "one").values()) == 4


def test_what_makes_no_sense_is_refused(alike, tmp_path):
    out = tmp_path / "mixed"
    with pytest.raises(ConfigError, match=r"There are 1 weights for 2 adapters; give one weight for each"):
        veneer.combine(alike, [1.0], out)
    with pytest.raises(ConfigError, match="weights holds nan, which is no finite number"):
        veneer.combine(alike, [1.0, float("nan")], out)
    with pytest.raises(ArgumentError, match="combine takes a list of folders, not the str"):
        veneer.combine(str(alike[0]), [1.0], out)
    with pytest.raises(ConfigError, match="density is an option of how = ties or dare_linear or dare_ties"):
        veneer.combine(alike, _WEIGHTS, out, density=0.2)
    other = _adapter(tmp_path / "c", 3, rank=2, targets=["q_proj"])
    with pytest.raises(ConfigError, match=r"'linear' adds matrices of one rank, and those of .* have the ranks 2, 4"):
        veneer.combine([alike[0], other], _WEIGHTS, out, how="linear")
    dora = _adapter(tmp_path / "d", 3, rank=2, targets=["q_proj"], dora=True)
    with pytest.raises(AdapterFileError, match="trains more than low-rank updates"):
        veneer.combine([alike[0], dora], _WEIGHTS, out)
    model = torch.nn.Module()
    model.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Module()])})
    model.model.layers[0].self_attn = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(3, 5)})
    veneer.attach(model, veneer.LoRA(targets=["q_proj"]))
    veneer.save(model, tmp_path / "e")
    with pytest.raises(
        AdapterFileError, match=r"q_proj is \(5, 3\) in .*e and \(32, 32\) in .*: these are adapters of"
    ):
        veneer.combine([alike[0], tmp_path / "e"], _WEIGHTS, out)
    assert not out.exists()
