"""Adapters in which peft and Veneer name modules in other ways: the tensors say what is meant, with the same logits."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import tiny
import veneer
from veneer.errors import AdapterFileError

pytestmark = pytest.mark.interop

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 64}
_CLASS = {"input_ids": torch.arange(1, 15).view(2, 7), "labels": torch.tensor([0, 1])}
_TAGS = {"input_ids": _CLASS["input_ids"], "labels": torch.ones(2, 7, dtype=torch.long)}
_CLASSIFIERS = {
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig(**_TEXT), _CLASS),
    "electra": (tf.ElectraForSequenceClassification, tf.ElectraConfig(**_TEXT, embedding_size=32), _CLASS),
    "distilbert": (tf.DistilBertForSequenceClassification, tf.DistilBertConfig(**_DISTIL), _CLASS),
    "deberta": (tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config(**_TEXT, pooler_hidden_size=32), _CLASS),
    "tags": (tf.BertForTokenClassification, tf.BertConfig(**_TEXT), _TAGS),
}


def _assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def _classifier(name, seed=0):
    """The same body each time, and what is new for the task by the seed."""
    made, config, _ = _CLASSIFIERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(config).eval()
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in model.named_parameters():
            if not path.startswith(model.base_model_prefix):
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["dense", "q_lin", "query_proj"]])
@pytest.mark.parametrize("name", _CLASSIFIERS)
def test_peft_loads_what_is_new_of_our_classifiers(name, targets, tmp_path):
    model, inputs = _classifier(name), _CLASSIFIERS[name][-1]
    if targets != "all-linear":
        ends = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        targets = [target for target in targets if target in ends]
    veneer.attach(model, veneer.LoRA(rank=4, targets=targets))
    tiny.train_steps(model, inputs)
    veneer.save(model, tmp_path / "a")
    ours = _classifier(name, seed=1)
    veneer.load_adapter(ours, tmp_path / "a")
    assert torch.equal(tiny.logits(ours, inputs), tiny.logits(model, inputs))
    theirs = peft.PeftModel.from_pretrained(_classifier(name, seed=1), tmp_path / "a").eval()
    _assert_same(tiny.logits(theirs, inputs), tiny.logits(model, inputs))


def test_a_name_that_is_another_ones_ending_is_read_as_it_was_meant(tmp_path):
    """PEFT reads "classifier" as pre_classifier, too, and adds it for every classifier."""
    model = _classifier("distilbert")
    veneer.attach(model, veneer.LoRA(rank=4, targets=["q_lin", "pre_classifier"]))
    tiny.train_steps(model, _CLASS)
    veneer.save(model, tmp_path / "a")
    ours = _classifier("distilbert")
    veneer.load_adapter(ours, tmp_path / "a")
    assert torch.equal(tiny.logits(ours, _CLASS), tiny.logits(model, _CLASS))
    theirs = peft.PeftModel.from_pretrained(_classifier("distilbert"), tmp_path / "a").eval()
    _assert_same(tiny.logits(theirs, _CLASS), tiny.logits(model, _CLASS))


@pytest.mark.parametrize("written", ["all-linear", None])
@pytest.mark.parametrize("name", ["roberta", "electra", "deberta", "tags"])
def test_we_load_pefts_classifiers(name, written, tmp_path):
    inputs, task = _CLASSIFIERS[name][-1], "TOKEN_CLS" if name == "tags" else "SEQ_CLS"
    targets = ["query", "value"] if name == "tags" else "all-linear"  # of which PEFT makes no tagger
    config = peft.LoraConfig(r=4, target_modules=targets, task_type=task)
    theirs = peft.get_peft_model(_classifier(name), config)
    tiny.train_steps(theirs, inputs)
    theirs.save_pretrained(tmp_path)
    if written is None:  # as a config that leaves them to the model's type
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": None}))
    ours = _classifier(name, seed=0 if name == "deberta" else 1)  # whose pooler PEFT adapts
    veneer.load_adapter(ours, tmp_path)
    _assert_same(tiny.logits(ours, inputs), tiny.logits(theirs, inputs))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_we_load_pefts_over_a_resized_vocabulary(name, targets, tmp_path):
    """PEFT writes the embedding and the head beside the update, with which a base of other rows is right."""
    tiny.build(name).save_pretrained(tmp_path / "base")

    def resized(seed):
        model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(70)
        return model

    inputs = {"input_ids": torch.tensor([[3, 64, 69]]), "labels": torch.tensor([[3, 64, 69]])}
    theirs = peft.get_peft_model(resized(1), peft.LoraConfig(r=4, target_modules=targets))
    tiny.train_steps(theirs, inputs)
    theirs.save_pretrained(tmp_path / "a")
    ours = resized(2)
    veneer.load_adapter(ours, tmp_path / "a")
    _assert_same(tiny.logits(ours, inputs), tiny.logits(theirs, inputs))
    veneer.save(ours, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(resized(3), tmp_path / "b").eval()
    _assert_same(tiny.logits(again, inputs), tiny.logits(theirs, inputs))
    with pytest.raises(
        AdapterFileError, match=r"its vocabulary has 70 tokens and this model's 64: call model.resize_token_embeddings"
    ):
        veneer.load_adapter(tiny.build(name), tmp_path / "a")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
    ],
)
def test_we_load_pefts_that_stay_tied(options, tmp_path):
    inputs = tiny.batch("llama-tied")
    config = peft.LoraConfig(r=4, ensure_weight_tying=True, **copy.deepcopy(options))  # PEFT changes the lists
    theirs = peft.get_peft_model(tiny.build("llama-tied"), config)
    tiny.train_steps(theirs, inputs)
    theirs.save_pretrained(tmp_path)
    ours = tiny.build("llama-tied")
    veneer.load_adapter(ours, tmp_path)
    torch.testing.assert_close(tiny.logits(ours, inputs), tiny.logits(theirs, inputs), rtol=1e-6, atol=1e-6)
    apart = "modules_to_save" in options or "embed_tokens" in options["target_modules"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        veneer.load_adapter(tiny.build("llama-tied"), tmp_path, trainable=True)
    sentence = (
        "model.embed_tokens and lm_head are tied in the file (ensure_weight_tying), and are trained apart from here."
    )
    assert [str(warning.message) for warning in said] == ([sentence] if apart else [])


def test_we_load_keys_with_an_adapters_name_and_tensors_in_8_bits(tmp_path):
    inputs = tiny.batch("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(tiny.build("llama"), config)
    tiny.train_steps(theirs, inputs)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    named = {key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor
             for key, tensor in tensors.items()}  # fmt: skip
    save_file(named, file)
    ours = tiny.build("llama")
    veneer.load_adapter(ours, tmp_path)
    _assert_same(tiny.logits(ours, inputs), tiny.logits(theirs, inputs))
    low = {key: tensor.to(torch.float8_e4m3fn) if ".lora_" in key else tensor for key, tensor in tensors.items()}
    save_file(low, file)
    ours, again = tiny.build("llama"), tiny.build("llama")
    veneer.load_adapter(ours, tmp_path)
    save_file({key: tensor.float() for key, tensor in low.items()}, file)
    veneer.load_adapter(again, tmp_path)
    assert torch.equal(tiny.logits(again, inputs), tiny.logits(ours, inputs))
