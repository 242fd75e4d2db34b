"""Models that take images or sound beside text: the text part is loaded, trained and generates; the whole is saved."""

from __future__ import annotations

import copy
import io
import json
import shutil

import pytest
import torch
import transformers as tf
from peft import PeftModel
from rich.console import Console

import composite
import veneer
from tokens import tokenizer
from veneer.errors import ModelError
from veneer.frozen.weight import QuantisedLinear
from veneer.models.composite import left_out_of
from veneer.models.load import load
from veneer.planning.config import PlanOptions
from veneer.planning.plan import NO_MACHINE, plan

pytestmark = pytest.mark.unit

IDS = torch.tensor([[72, 69, 76, 76, 79, 32, 87, 79]])
FIRST = ("gemma3", "mistral3", "qwen2_5_vl", "llava")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function from a name to the folder of that model, and the model that was written there."""
    made = {}

    def of(name):
        if name not in made:
            model, folder = composite.build(name), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text('{"size": 28}')
            made[name] = folder, model
        return made[name]

    return of


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _dense(model):
    """A copy of a quantised model's values in transformers' own modules."""
    return {
        f"{name}.weight": module.frozen().dense() for name, module in model.named_modules()
        if isinstance(module, QuantisedLinear)
    }  # fmt: skip


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("name", composite.MODELS)
def test_text_passes_through_the_text_part_as_through_the_whole(folders, name, storage):
    folder, whole = folders(name)
    model, _ = load(folder, storage)
    assert type(model).__name__ == type(whole).__name__
    parts = left_out_of(model)
    assert parts
    assert not [key for key in model.state_dict() if key.startswith(tuple(parts))]
    if storage == "fp32":
        assert torch.equal(_logits(model), _logits(whole))
        return
    codes = _dense(model)
    assert codes.keys() == {
        f"{key}.weight" for key, module in whole.named_modules()
        if type(module) is torch.nn.Linear and key != "lm_head" and not key.startswith(tuple(parts))
    }  # fmt: skip
    same = composite.build(name)
    same.load_state_dict(codes, strict=False)
    torch.testing.assert_close(_logits(model), _logits(same), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_other_storages(folders, storage):
    folder, whole = folders("gemma3")
    torch.testing.assert_close(_logits(load(folder, storage)[0]).float(), _logits(whole), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("name", composite.MODELS)
def test_an_adapter_trained_on_text_fits_the_whole_model_in_peft(folders, tmp_path, rows_file, name, storage):
    folder, _ = folders(name)
    result = veneer.train(
        str(folder), data=str(rows_file), output=str(tmp_path / "run"), steps=2, rank=2, batch_size=4, held_out=8,
        storage=storage, learning_rate=1e-2, console=Console(file=io.StringIO()),
    )  # fmt: skip
    adapted = veneer.trainable(result.model).rows
    assert adapted
    assert not [row.name for row in adapted if row.name.startswith(tuple(left_out_of(result.model)))]
    fields = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert fields["task_type"] == "CAUSAL_LM"
    base = composite.build(name)
    if storage == "nf4":
        base.load_state_dict(_dense(load(folder, "nf4")[0]), strict=False)
    own = _logits(result.model)
    known = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    assert not [key for key, _ in known.named_modules() if "lora_A" in key and "vision" in key]
    torch.testing.assert_close(own, _logits(known), rtol=1e-4, atol=1e-5)
    with known.disable_adapter():
        assert not torch.equal(own, _logits(known))


@pytest.mark.parametrize("name", FIRST)
def test_a_merged_model_is_whole(folders, tmp_path, name):
    folder, whole = folders(name)
    model, _ = veneer.load(folder)
    veneer.attach(model, veneer.LoRA(rank=2))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and key.endswith("B"):
                parameter.fill_(0.1)
    veneer.save(model, tmp_path / "adapter")
    wanted = _logits(model)
    veneer.merge(model)
    model.save_pretrained(tmp_path / "merged")
    assert left_out_of(model), "they are in memory while it is written"
    read, differences = type(whole).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(differences.values())
    torch.testing.assert_close(_logits(read), wanted, rtol=1e-4, atol=1e-5)
    parts = tuple(left_out_of(model))
    others = {key: tensor for key, tensor in whole.state_dict().items() if key.startswith(parts)}
    assert others
    assert all(torch.equal(read.state_dict()[key], tensor) for key, tensor in others.items())


def test_merge_quantize_inspect_and_generate_on_the_command_line(folders, tmp_path, veneer_command):
    folder, whole = folders("gemma3")
    model, _ = veneer.load(folder)
    veneer.attach(model, veneer.LoRA(rank=2))
    veneer.save(model, tmp_path / "adapter")
    assert veneer_command("merge", tmp_path / "adapter", tmp_path / "merged").code == 0
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    read = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert read.state_dict().keys() == whole.state_dict().keys()
    assert veneer_command("quantize", folder, tmp_path / "nf4").code == 0
    assert (tmp_path / "nf4" / "preprocessor_config.json").is_file()
    bits = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "nf4")
    assert {type(m).__name__ for k, m in bits.named_modules() if k.endswith("q_proj")} == {"Linear4bit", "Linear"}
    wanted, _ = load(folder, "nf4")
    for key, module in wanted.named_modules():
        if isinstance(module, QuantisedLinear):
            there = bits.get_parameter(f"{key}.weight")
            assert torch.equal(there.data.flatten(), module.codes)
            assert torch.equal(there.quant_state.absmax, module.scales)
    torch.testing.assert_close(_logits(load(tmp_path / "nf4")[0]), _logits(wanted), rtol=1e-4, atol=1e-5)
    inspected = veneer_command("inspect", folder)
    assert "Gemma3ForConditionalGeneration" in inspected.out
    assert (
        "not loaded, for text does not pass through them: model.vision_tower, model.multi_modal_projector"
        in inspected.out
    )
    assert veneer_command("generate", folder, "hello", "--max-new-tokens", "4").code == 0


def test_an_image_given_to_the_text_part_is_refused(folders):
    model, _ = load(folders("gemma3")[0])
    with pytest.raises(ModelError, match=r"^model\.vision_tower is not loaded, since veneer\.load reads the text part"):
        model(input_ids=IDS, pixel_values=torch.zeros(1, 3, 28, 28))


def test_a_whole_model_of_transformers_is_adapted_in_its_text_part_alone(folders):
    model = composite.build("gemma3")
    veneer.attach(model, veneer.LoRA(rank=2, targets="all-linear"))
    assert all(row.name.startswith("model.language_model.") for row in veneer.trainable(model).rows)


def test_types_without_a_text_part_are_refused_in_a_sentence(tmp_path):
    text = {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16,
            "word_embed_proj_dim": 16}  # fmt: skip
    config = tf.Blip2Config(text_config=text)
    config.architectures = ["Blip2ForConditionalGeneration"]
    config.save_pretrained(tmp_path / "blip")
    with pytest.raises(
        ModelError,
        match=r"blip is a Blip2ForConditionalGeneration, which reads no text alone: it also needs pixel_values\.$",
    ):
        load(tmp_path / "blip")
    config = tf.CLIPVisionConfig()
    config.save_pretrained(tmp_path / "clip")
    with pytest.raises(
        ModelError,
        match=r"clip is of the type 'clip_vision_model', of which transformers has no causal language model\.$",
    ):
        load(tmp_path / "clip")


def test_the_other_parts_gone_from_their_place_are_named(folders, tmp_path):
    folder = shutil.copytree(folders("llava")[0], tmp_path / "copy")
    model, _ = load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="There is no model at"):
        model.save_pretrained(tmp_path / "out")


def test_a_plan_counts_what_is_loaded(folders, tmp_path):
    folder, whole = folders("mistral3")
    config = copy.deepcopy(whole.config.text_config)
    config.tie_word_embeddings = whole.config.tie_word_embeddings
    text = tf.MistralForCausalLM(config)
    text.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for storage in ("fp32", "nf4"):
        both = (PlanOptions(model=str(place), storage=storage, max_length=64) for place in (folder, tmp_path))
        plans = [plan(options, NO_MACHINE) for options in both]
        assert plans[0].needed == plans[1].needed
