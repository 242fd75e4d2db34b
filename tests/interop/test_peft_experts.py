"""LoRA on a mixture's experts against peft's target_parameters: same logits and gradients, files both ways, merges."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch

import tiny
import veneer
from veneer.frozen.layers import quantise_linear_layers
from veneer.updates.adapter_file import adapter_tensors

# peft compares the patterns with modules alone in a warning, and applies them to parameters all the same.
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore:The following .*_pattern keys")]

_BOTH = ["experts.gate_up_proj", "experts.down_proj"]
_CASES = [
    {"target_modules": ["q_proj"], "target_parameters": _BOTH},
    {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True},
    {"target_modules": [], "target_parameters": ["gate_up_proj"], "init_lora_weights": "gaussian"},
    {  # which narrow modules alone
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["experts.down_proj"],
        "layers_to_transform": [1],
        "exclude_modules": ["o_proj"],
    },
    {
        "target_modules": ["o_proj"],
        "target_parameters": _BOTH,
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {r"layers\.0.*gate_up_proj": 3},
    },
]


def _built(name):
    model = tiny.build(name)
    model.set_experts_implementation("eager")
    return model


def _bases(name, storage):
    """The base here, and the same values as a plain model, for peft, which adapts no experts in codes."""
    plain = _built(name)
    if storage == "fp32":
        return copy.deepcopy(plain), plain
    coded = copy.deepcopy(plain)
    quantise_linear_layers(coded, storage=storage, block_size=32, double_quantisation=True)
    return coded, tiny.expanded(coded, plain)


def _theirs(base, options, folder):
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, **options)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def _gradients(model, inputs):
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def _file(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("options", _CASES)
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_theirs_here_has_their_logits_gradients_and_merge(name, storage, options, tmp_path):
    torch.manual_seed(1)
    inputs = {"input_ids": tiny.batch(name)["input_ids"]}
    ours, plain = _bases(name, storage)
    theirs = _theirs(plain, options, tmp_path / "theirs")
    veneer.load_adapter(ours, tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(tiny.logits(ours, inputs), tiny.logits(theirs, inputs), rtol=0, atol=1e-6)

    wanted = _gradients(theirs, inputs)
    ours.zero_grad()
    ours(**inputs).logits.square().mean().backward()
    own = {key: tensor.grad for key, tensor in adapter_tensors(ours, "default").items()}
    assert own.keys() == {key.replace(".default", "") for key in wanted}
    for key, gradient in wanted.items():
        torch.testing.assert_close(own[key.replace(".default", "")], gradient, rtol=1e-4, atol=1e-6)

    veneer.merge(ours)
    merged = theirs.merge_and_unload().state_dict()
    assert ours.state_dict().keys() == merged.keys()
    for key, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[key], rtol=0, atol=1e-6)
    veneer.unmerge(ours)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "all-linear", "target_parameters": _BOTH},
        {"targets": ["gate_up_proj"], "layers": [1]},
        {"targets": r".*layers\.1\..*(q_proj|down_proj)"},
        {"targets": ["v_proj", "experts.down_proj"], "rank_pattern": {"down_proj": 1}, "rslora": True},
    ],
)
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_peft_loads_ours(name, storage, options, tmp_path):
    inputs = tiny.batch(name)
    ours, plain = _bases(name, storage)
    veneer.attach(ours, veneer.LoRA(rank=4, alpha=6, **options))
    before = tiny.logits(ours, inputs)
    tiny.train_steps(ours, inputs)
    assert not torch.equal(tiny.logits(ours, inputs), before)
    veneer.save(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    torch.testing.assert_close(tiny.logits(theirs, inputs), tiny.logits(ours, inputs), rtol=0, atol=1e-6)
    again = _bases(name, storage)[0]
    veneer.load_adapter(again, tmp_path / "a")
    assert torch.equal(tiny.logits(again, inputs), tiny.logits(ours, inputs))


def test_a_file_of_theirs_is_written_again_as_the_same_bytes(tmp_path):
    torch.manual_seed(1)
    ours, plain = _bases("mixtral", "fp32")
    _theirs(plain, _CASES[-1], tmp_path / "theirs")
    veneer.load_adapter(ours, tmp_path / "theirs")
    veneer.save(ours, tmp_path / "ours")
    weights = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("theirs", "ours")]
    assert weights[0] == weights[1]
    theirs, own = _file(tmp_path / "theirs"), _file(tmp_path / "ours")
    for field in ("target_parameters", "target_modules"):
        assert sorted(theirs[field]) == sorted(own[field])
    for field in ("r", "rank_pattern", "alpha_pattern"):
        assert theirs[field] == own[field]


def test_two_adapters_of_theirs_are_summed_and_taken_off(tmp_path):
    inputs = {"input_ids": tiny.batch("qwen3-moe")["input_ids"]}
    ours = _built("qwen3-moe")
    before, base = tiny.state(ours), tiny.logits(ours, inputs)
    deltas = []
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        theirs = _theirs(_built("qwen3-moe"), _CASES[1], tmp_path / name)
        veneer.load_adapter(ours, tmp_path / name, name=name)
        torch.testing.assert_close(tiny.logits(ours, inputs), tiny.logits(theirs, inputs), rtol=0, atol=1e-6)
        merged = theirs.merge_and_unload().state_dict()
        deltas.append({key: tensor - before[key] for key, tensor in merged.items()})
    veneer.activate(ours, "a", "b")
    wanted = _built("qwen3-moe")
    wanted.load_state_dict({key: tensor + deltas[0][key] + deltas[1][key] for key, tensor in before.items()})
    torch.testing.assert_close(tiny.logits(ours, inputs), tiny.logits(wanted, inputs), rtol=0, atol=1e-5)
    veneer.remove(ours, "a")
    veneer.remove(ours, "b")
    assert tiny.same_state(ours, before)
    assert torch.equal(tiny.logits(ours, inputs), base)
