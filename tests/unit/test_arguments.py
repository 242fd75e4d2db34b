"""A wrong type at a public function is one sentence, as a wrong value is, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

import tiny
import veneer
from veneer.arguments import texts_given
from veneer.errors import ArgumentError, VeneerError, shown
from veneer.training.config import TrainConfig

pytestmark = pytest.mark.unit


@pytest.fixture
def model():
    return tiny.build("llama")


NO_MODEL = {
    "attach": lambda model: veneer.attach(model, veneer.LoRA()),
    "activate": veneer.activate,
    "allocator": veneer.allocator,
    "disabled": lambda model: veneer.disabled(model).__enter__(),
    "int8_activations": lambda model: veneer.int8_activations(model).__enter__(),
    "load_adapter": lambda model: veneer.load_adapter(model, "adapter"),
    "merge": veneer.merge,
    "remove": veneer.remove,
    "save": lambda model: veneer.save(model, "adapter"),
    "save_base": lambda model: veneer.save_base(model, None, "base"),
    "trainable": veneer.trainable,
    "unmerge": veneer.unmerge,
}


@pytest.mark.parametrize("function", NO_MODEL)
@pytest.mark.parametrize("given", ["path", 3, None, torch.nn.Linear, ["a"]], ids=shown)
def test_what_is_no_model_is_refused(function, given):
    with pytest.raises(ArgumentError, match=rf"^{function} takes a loaded model \(a torch.nn.Module\) as model, not "):
        NO_MODEL[function](given)


def test_the_refusal_tells_how_a_model_is_loaded(model):
    with pytest.raises(
        VeneerError, match=r"not the str 'path'. Load it first: model, tokenizer = veneer.load\('path'\)"
    ):
        veneer.attach("path", veneer.LoRA())
    with pytest.raises(TypeError, match=r"veneer\.load gives two things: model, tokenizer = "):
        veneer.trainable((model, None))


def test_options_of_another_type_are_answered_with_the_call(model):
    for config, said in [
        ({"rank": 4}, r"not the dict {'rank': 4}. Write veneer.LoRA\(\*\*options\)"),
        (veneer.LoRA, r"not the class LoRA. Write LoRA\(…\)"),
        (None, "veneer.LoRA or veneer.AdaLoRA as config, not None."),
        (8, "as config, not the int 8."),
    ]:
        before = tiny.state(model)
        with pytest.raises(ArgumentError, match=said):
            veneer.attach(model, config)
        assert tiny.same_state(model, before)


def test_pefts_config_is_answered_with_the_same_options_here(model):
    peft = pytest.importorskip("peft")
    for config, call in [
        (peft.LoraConfig(), "veneer.LoRA(alpha=8)"),
        (
            peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["v_proj", "q_proj"], use_rslora=True),
            "veneer.LoRA(rank=4, targets=['q_proj', 'v_proj'], alpha=16, dropout=0.1, rslora=True)",
        ),
        (
            peft.AdaLoraConfig(init_r=6, target_r=4, total_step=100, tinit=10, tfinal=20),
            "veneer.AdaLoRA(alpha=8, target_rank=4, initial_rank=6, tinit=10, tfinal=20, orthogonality=0.5, "
            "total_steps=100)",
        ),
    ]:
        with pytest.raises(ArgumentError) as caught:
            veneer.attach(model, config)
        said = str(caught.value).partition("Its options are here: ")[2]
        assert said == f"{call}."
        veneer.attach(tiny.build("llama"), eval(call, {"veneer": veneer}))


def test_names_are_text(model):
    veneer.attach(model, veneer.LoRA(), "a")
    for call, said in [
        (
            lambda: veneer.attach(model, veneer.LoRA(), name=3),
            "attach takes the name of an adapter as a str, not the int",
        ),
        (lambda: veneer.remove(model, name=3), "remove takes the name of an adapter as a str, not the int 3"),
        (lambda: veneer.activate(model, ["a", "b"]), r"one after another: activate\(model, 'a', 'b'\)"),
        (lambda: veneer.allocator(model, 3), "allocator takes the name"),
        (lambda: veneer.save(model, "x", name=3), "save takes the name"),
        (lambda: veneer.load_adapter(model, "x", name=None), "load_adapter takes the name of an adapter as a str, not"),
    ]:
        with pytest.raises(ArgumentError, match=said):
            call()


def test_folders_are_paths(model, tmp_path):
    veneer.attach(model, veneer.LoRA())
    for call, said in [
        (lambda: veneer.save(model, 3), r"save takes a path \(str or pathlib.Path\) as folder, not the int 3"),
        (
            lambda: veneer.load_adapter(model, None),
            r"load_adapter takes a path \(str or pathlib.Path\) as folder, not N",
        ),
        (lambda: veneer.export(3, tmp_path), "export takes a path .* as folder, not the int 3"),
        (lambda: veneer.export("x", None), "export takes a path .* as out, not None"),
        (
            lambda: veneer.save_base(model, None, tmp_path),
            "save_base takes the model's tokenizer as tokenizer, not None",
        ),
    ]:
        with pytest.raises(ArgumentError, match=said):
            call()


def test_one_text_is_a_list_of_one():
    assert texts_given("generate", "one string", "prompts") == ["one string"]
    assert texts_given("generate", ("a", "b"), "prompts") == ["a", "b"]
    for wrong in (3, ["a", 3], None, b"x"):
        with pytest.raises(ArgumentError, match="generate takes a str, or a list of str, as prompts, not"):
            texts_given("generate", wrong, "prompts")


def test_attach_returns_the_model(model):
    assert veneer.attach(model, veneer.LoRA()) is model


def test_the_options_of_a_run_are_taken_as_loras():
    """A run's config is a LoRA, too."""
    model = veneer.attach(tiny.build("llama"), TrainConfig(model="m", data="d", output="o", rank=2))
    assert {row.rank for row in veneer.trainable(model).rows} == {2}
