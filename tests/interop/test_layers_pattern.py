"""Which number of a name is its layer's: PEFT's layers_to_transform and layers_pattern, and ours."""

from __future__ import annotations

import json

import peft
import pytest
from torch import nn

import tiny
import veneer
from veneer.errors import AdapterFileError, ConfigError, TargetError
from veneer.updates.layers import LowRank
from veneer.updates.record import updates_of

pytestmark = pytest.mark.interop


def _nested():
    """stages.{0,1}.blocks.{0,1,2}.experts.{0,1}.fc: names with three numbers."""

    def block():
        part = nn.Module()
        part.experts = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(3, 3)}) for _ in range(2)])
        return part

    model = nn.Module()
    model.body = nn.Module()
    model.body.stages = nn.ModuleList([nn.Module() for _ in range(2)])
    for stage in model.body.stages:
        stage.blocks = nn.ModuleList([block() for _ in range(3)])
    return model


def _of_peft(model, layers, pattern):
    config = peft.LoraConfig(r=2, target_modules=["fc"], layers_to_transform=layers, layers_pattern=pattern)
    wrapped = peft.get_peft_model(model, config)
    names = [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    return wrapped, {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize("pattern", [None, "stages", "blocks", "experts", ["blocks"], ["stages.0.blocks", "experts"]])
def test_the_same_modules_as_in_peft(pattern, tmp_path):
    theirs, expected = _of_peft(_nested(), [1], pattern)
    model = _nested()
    veneer.attach(model, veneer.LoRA(rank=2, targets=["fc"], layers=[1], layers_pattern=pattern or []))
    assert set(updates_of(model, "default")) == expected
    assert expected
    for update in updates_of(model, "default").values():
        nn.init.normal_(update.B)
    theirs.save_pretrained(tmp_path)
    fresh = _nested()
    veneer.load_adapter(fresh, tmp_path)
    assert set(updates_of(fresh, "default")) == expected
    veneer.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(_nested(), tmp_path / "ours")
    assert {name for name, module in again.named_modules() if hasattr(module, "lora_A")} == {
        f"base_model.model.{name}" for name in expected
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "mixtral"])
def test_without_a_pattern_it_is_the_first_number_of_a_models_names(name):
    targets = {"llama": "q_proj", "gpt2": "c_attn", "t5": "wi", "bert": "query", "mixtral": "q_proj"}[name]
    config = peft.LoraConfig(r=2, target_modules=[targets], layers_to_transform=[1])
    theirs = peft.get_peft_model(tiny.build(name), config)
    expected = {
        n.removeprefix("base_model.model.") for n, module in theirs.named_modules() if hasattr(module, "lora_A")
    }
    model = tiny.build(name)
    veneer.attach(model, veneer.LoRA(rank=2, targets=[targets], layers=[1]))
    assert {n for n, update in updates_of(model, "default").items() if isinstance(update, LowRank)} == expected


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="layers_pattern says which numbers layers counts, and layers is not given"):
        veneer.LoRA(layers_pattern="blocks")
    said = "layers_pattern names 'layers', which is no list of modules of this model; it has stages, blocks, experts"
    with pytest.raises(TargetError, match=said):
        veneer.attach(_nested(), veneer.LoRA(targets=["fc"], layers=[1], layers_pattern="layers"))
    with pytest.raises(TargetError, match="layers names 2, but the model's layers are 0 to 1"):
        veneer.attach(_nested(), veneer.LoRA(targets=["fc"], layers=[2], layers_pattern="experts"))
    theirs, _ = _of_peft(_nested(), [1], "blocks")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    for pattern, said in (("(a+)+", "has the expression .* in layers_pattern"), (3, "which is no list of names")):
        file.write_text(json.dumps(fields | {"layers_pattern": pattern}))
        with pytest.raises(AdapterFileError, match=said):
            veneer.load_adapter(_nested(), tmp_path)
