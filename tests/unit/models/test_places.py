"""Tensors without a place, tied weights that differ, and values that are not finite: one answer in every storage."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import tiny
from tokens import tokenizer
from veneer.commands.quantize import quantise_to
from veneer.errors import ModelError
from veneer.models.checkpoint import Checkpoint
from veneer.models.finite import is_finite
from veneer.models.load import load

pytestmark = pytest.mark.unit

IDS = {"input_ids": torch.tensor([[72, 69, 76, 76, 79]])}
LAYER = "model.layers.0.self_attn"
STORAGES = ["fp32", "bf16", "fp16", "nf4", "int8"]


@pytest.fixture(scope="module")
def quantised(tiny_folder, tmp_path_factory):
    """The tiny model as a bitsandbytes checkpoint."""
    out = tmp_path_factory.mktemp("bnb") / "out"
    quantise_to(str(tiny_folder), out)
    return out


@pytest.fixture
def changed(tiny_folder, tmp_path):
    """A function that makes the tiny folder, or another, with other tensors and another config."""

    def make(change=None, source=tiny_folder, **config):
        folder = shutil.copytree(source, tmp_path / "changed")
        tensors = load_file(folder / "model.safetensors")
        if change is not None:
            change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said | config))
        return folder

    return make


def _refusal(folder, storage="fp32", **options):
    with pytest.raises(ModelError) as refused:
        load(folder, storage, **options)
    return str(refused.value).replace(str(folder), "FOLDER")


SURPLUS = {
    f"{LAYER}.q_proj.bias": torch.ones(32),
    f"{LAYER}.q_norm.weight": torch.ones(8),
    f"{LAYER}.q_proj.lora_A.default.weight": torch.ones(2, 32),
    f"{LAYER}.q_proj.weight_scale": torch.ones(1),
    "v_head.summary.weight": torch.ones(1, 32),
}


@pytest.mark.parametrize("storage", STORAGES)
def test_a_tensor_without_a_place_is_refused_in_every_storage(changed, storage):
    name = list(SURPLUS)[STORAGES.index(storage)]  # each once
    assert _refusal(changed(lambda tensors: tensors.update({name: SURPLUS[name]})), storage) == (
        f"The checkpoint of FOLDER holds what its model has no place for: {name}; it belongs to another config.json, "
        f"or is in a form that cannot be read."
    )


def test_and_so_it_is_beside_codes(changed, quantised):
    folder = changed(lambda tensors: tensors.update({f"{LAYER}.q_norm.weight": torch.ones(8)}), quantised)
    assert f"has no place for: {LAYER}.q_norm.weight;" in _refusal(folder)


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_a_layer_more_than_the_config_has(changed, storage):
    assert "has no place for: model.layers.1.input_layernorm.weight, " in _refusal(
        changed(num_hidden_layers=1), storage
    )


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_what_is_of_no_use_is_dropped(changed, tiny_folder, storage):
    """Frequencies and positions that the model computes, and a layer that predicts a second token."""

    def change(tensors):
        tensors[f"{LAYER}.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.embeddings.position_ids"] = torch.arange(4)
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(32)

    ours, _ = load(changed(change, num_nextn_predict_layers=1), storage)
    assert torch.equal(tiny.logits(ours, IDS), tiny.logits(load(tiny_folder, storage)[0], IDS))


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_the_head_of_another_task_is_dropped_and_nothing_else(changed, storage):
    folder = changed(architectures=["LlamaForCausalLM"])
    model, _ = load(folder, storage, labels=["a", "b"])
    assert model.score.weight.shape == (2, 32)
    tensors = load_file(folder / "model.safetensors") | {f"{LAYER}.q_norm.weight": torch.ones(8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"has no place for: {LAYER}.q_norm.weight;" in _refusal(folder, storage, labels=["a", "b"])


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_the_pooler_and_the_head_of_an_encoder(name, tmp_path):
    """What masked language models and encoder-decoders have is of no use to a classifier."""
    built = tiny.build(name)
    if name == "bert":
        built = tf.BertForPreTraining(built.config)
    built.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, _ = load(tmp_path, labels=["a", "b"])
    assert type(model).__name__.endswith("ForSequenceClassification")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_head_that_differs_from_the_embedding_stays_the_head(changed, storage):
    """As transformers has it: the config says tied, the file holds both, and they are not the same."""
    folder = changed(tie_word_embeddings=True)
    checkpoint = Checkpoint(folder)
    model, _ = load(checkpoint, storage)
    oracle = tf.AutoModelForCausalLM.from_pretrained(folder)
    dtype = model.lm_head.weight.dtype
    assert torch.equal(model.lm_head.weight, oracle.lm_head.weight.to(dtype))
    assert torch.equal(model.model.embed_tokens.weight, oracle.model.embed_tokens.weight.to(dtype))
    assert model.config.tie_word_embeddings is False, "who ties the weights later would replace the head"
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert checkpoint.notes[-1] == (
        "lm_head.weight is not the embedding, as config.json says: the checkpoint holds another one, used here."
    )


def test_a_head_beside_codes_likewise(changed, quantised):
    folder = changed(source=quantised, tie_word_embeddings=True)
    model, _ = load(folder)
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])
    assert torch.equal(tiny.logits(model, IDS), tiny.logits(load(quantised)[0], IDS))


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_equal_weights_or_one_alone_are_tied(changed, storage):
    folder = changed(
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}), tie_word_embeddings=True
    )
    model, _ = load(folder, storage)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["model.embed_tokens.weight", "model.norm.weight", f"{LAYER}.q_proj.weight"])
def test_what_is_not_finite_is_refused_by_name(changed, storage, value, where):
    def change(tensors):
        tensors[where].view(-1)[7] = value

    assert where in (said := _refusal(changed(change), storage))
    assert "is not finite" in said or (storage == "fp16" and "is infinite in fp16" in said)


def test_a_value_above_the_largest_of_fp16(changed):
    folder = changed(lambda tensors: tensors[f"{LAYER}.q_proj.weight"].fill_(1e5))
    assert _refusal(folder, "fp16") == (
        f"{LAYER}.q_proj.weight of FOLDER is infinite in fp16, whose largest value is 65504; load it as bf16 or fp32."
    )
    load(folder, "bf16")


def test_a_value_that_no_training_makes_is_refused_like_an_infinity(changed):
    large = changed(lambda tensors: tensors["model.embed_tokens.weight"].fill_(1e17))
    assert load(large)[0].model.embed_tokens.weight.max() == torch.tensor(1e17)
    shutil.rmtree(large)
    damaged = changed(lambda tensors: tensors["model.embed_tokens.weight"][3].fill_(-3e38))
    assert _refusal(damaged, "fp32").startswith(
        "model.embed_tokens.weight of FOLDER holds a value that is not finite, or"
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_8_bits_are_looked_at_too(dtype):
    assert is_finite(torch.ones(3).to(dtype))
    assert not is_finite(torch.tensor([1.0, torch.nan]).to(dtype))


def test_a_config_whose_architectures_are_no_list(changed):
    folder = changed(lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": 1.5}))
    load(folder)
