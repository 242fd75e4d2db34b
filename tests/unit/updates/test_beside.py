"""What is in no checkpoint is trained whole and saved: after a restart the adapter is on the same values."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as tf

import tiny
import veneer
from veneer.frozen.layers import quantise_linear_layers
from veneer.models.bnb_file import write_folder
from veneer.updates.adapter_file import adapter_tensors

pytestmark = pytest.mark.unit

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 64}
_DEBERTA = {**_TEXT, "pooler_hidden_size": 32, "relative_attention": True, "pos_att_type": ["c2p"]}
_WAVE = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_XLNET = {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
_TOKENS = {"input_ids": torch.arange(1, 15).view(2, 7)}
_SPANS = {**_TOKENS, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
_CLASS = {**_TOKENS, "labels": torch.tensor([0, 1])}
_SOUND = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))}
_PICTURE = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}

# The class that the checkpoint is written from, the class that reads it, its batch, what is new.
CASES = {
    "tokens": (tf.BertForMaskedLM, tf.BertConfig, _TEXT, tf.BertForTokenClassification,
               {**_TOKENS, "labels": torch.ones(2, 7, dtype=torch.long)}, ["classifier"]),
    "spans": (tf.BertForMaskedLM, tf.BertConfig, _TEXT, tf.BertForQuestionAnswering, _SPANS, ["qa_outputs"]),
    "pooler": (tf.BertForMaskedLM, tf.BertConfig, _TEXT, tf.BertForSequenceClassification, _CLASS,
               ["bert.pooler.dense", "classifier"]),
    "choice": (tf.BertForMaskedLM, tf.BertConfig, _TEXT, tf.BertForMultipleChoice,
               {"input_ids": torch.arange(1, 13).view(2, 2, 3), "labels": torch.tensor([0, 1])},
               ["bert.pooler.dense", "classifier"]),
    "distilbert": (tf.DistilBertForMaskedLM, tf.DistilBertConfig, _DISTIL, tf.DistilBertForSequenceClassification,
                   _CLASS, ["pre_classifier", "classifier"]),
    "deberta": (tf.DebertaV2ForMaskedLM, tf.DebertaV2Config, _DEBERTA, tf.DebertaV2ForSequenceClassification, _CLASS,
                ["pooler", "classifier"]),
    "xlnet": (tf.XLNetLMHeadModel, tf.XLNetConfig, _XLNET, tf.XLNetForSequenceClassification, _CLASS,
              ["sequence_summary", "logits_proj"]),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, _TEXT, tf.LlamaForTokenClassification,
              {**_TOKENS, "labels": torch.ones(2, 7, dtype=torch.long)}, ["score"]),
    "image": (tf.ViTModel, tf.ViTConfig, _IMAGE, tf.ViTForImageClassification,
              {**_PICTURE, "labels": torch.tensor([0, 1])}, ["classifier"]),
    "sound": (tf.Wav2Vec2Model, tf.Wav2Vec2Config, _WAVE, tf.Wav2Vec2ForSequenceClassification,
              {**_SOUND, "labels": torch.tensor([0, 1])}, ["projector", "classifier"]),
    "letters": (tf.Wav2Vec2Model, tf.Wav2Vec2Config, _WAVE, tf.Wav2Vec2ForCTC,
                {**_SOUND, "labels": torch.tensor([[1, 2], [3, 4]])}, ["lm_head"]),
    "words": (tf.LlamaModel, tf.LlamaConfig, {**_TEXT, "tie_word_embeddings": False}, tf.LlamaForCausalLM,
              {**_TOKENS, "labels": _TOKENS["input_ids"]}, ["lm_head"]),
}  # fmt: skip


def read(case, folder, seed):
    """The model of a case, as a new process reads it: what is new has other values each time."""
    written, config, sizes, made, _, _ = CASES[case]
    if not folder.exists():
        torch.manual_seed(0)
        written(config(**sizes)).save_pretrained(folder)
    torch.manual_seed(seed)
    return made.from_pretrained(folder).eval()


def output(model, inputs):
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.start_logits if hasattr(outputs, "start_logits") else outputs.logits


@pytest.mark.parametrize("case", CASES)
def test_what_is_in_no_checkpoint_comes_back_with_the_adapter(case, tmp_path):
    inputs, new = CASES[case][-2:]
    model = read(case, tmp_path / "base", 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        veneer.attach(model, veneer.LoRA(rank=2))
    assert {row.name for row in veneer.trainable(model).rows if row.rank is None} == set(new)
    verb = "is" if len(new) == 1 else "are"
    expected = f"{', '.join(new)} {verb} in no checkpoint: trained whole, and saved with the adapter."
    assert [str(warning.message) for warning in said] == [expected]
    tiny.train_steps(model, inputs)
    veneer.save(model, tmp_path / "adapter")
    again = read(case, tmp_path / "base", 2)
    assert not torch.equal(output(again, inputs), output(read(case, tmp_path / "base", 1), inputs))
    veneer.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(output(again, inputs), output(model, inputs))
    copied = copy.deepcopy(model)  # without transformers' marks of what it read
    veneer.save(copied, tmp_path / "copy")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_a_head_that_the_checkpoint_has_is_adapted_like_any_layer(tmp_path):
    torch.manual_seed(0)
    tf.BertForQuestionAnswering(tf.BertConfig(**_TEXT)).save_pretrained(tmp_path)
    model = tf.BertForQuestionAnswering.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.attach(model, veneer.LoRA(rank=2))
    assert all(row.rank == 2 for row in veneer.trainable(model).rows)
    assert "qa_outputs" in {row.name for row in veneer.trainable(model).rows}


def test_a_part_that_is_targeted_is_adapted_and_an_ending_that_reaches_a_new_part_is_not(tmp_path):
    model = read("distilbert", tmp_path / "base", 1)
    match = "^pre_classifier is in no checkpoint and gets a low-rank update, .*, or leave it out of targets to train it"
    with pytest.warns(UserWarning, match=match):  # a sequence classifier's head alone is no news
        veneer.attach(model, veneer.LoRA(rank=2, targets=["q_lin", "pre_classifier"]))
    rows = {row.name: row.rank for row in veneer.trainable(model).rows}
    assert rows["pre_classifier"] == 2
    assert rows["classifier"] is None
    for options in ({"targets": ["dense"]}, {"targets": r".*\.dense"},
                    {"targets": ["dense"], "exclude": ".*intermediate.*"}):  # fmt: skip
        model = tf.RobertaForSequenceClassification(tf.RobertaConfig(**_TEXT))
        veneer.attach(model, veneer.LoRA(rank=2, **options))  # the head has a dense, too
        rows = {row.name: row.rank for row in veneer.trainable(model).rows}
        assert rows["classifier"] is None
        assert "classifier.dense" not in rows
        assert len(rows) == (3 if "exclude" in options else 4)


def test_the_rows_of_a_larger_vocabulary_are_trained_and_saved(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "base")

    def resized(seed):
        model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(70)
        return model

    model, inputs = resized(1), {"input_ids": torch.tensor([[3, 64, 69]]), "labels": torch.tensor([[3, 64, 69]])}
    with pytest.warns(UserWarning, match="^the vocabulary's rows 64 to 69 are in no checkpoint: trained whole, and"):
        veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]))
    assert {row.name: row.parameters for row in veneer.trainable(model).rows if row.rank is None} == {
        "model.embed_tokens": 6 * 32,
        "lm_head": 6 * 32,
    }
    tiny.train_steps(model, inputs)
    veneer.save(model, tmp_path / "adapter")
    again = resized(2)
    veneer.load_adapter(again, tmp_path / "adapter")
    # The head's logits are the base's, whose new rows are others each time, and the difference.
    torch.testing.assert_close(tiny.logits(again, inputs), tiny.logits(model, inputs), rtol=0, atol=1e-6)
    whole = resized(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.attach(whole, veneer.LoRA(rank=2, targets=["q_proj"], train_also=["embed_tokens", "lm_head"]))
    assert not any("token_adapter" in key for key in adapter_tensors(whole, "default"))


def test_a_parameter_that_no_module_holds_alone_is_named(tmp_path):
    torch.manual_seed(0)
    tf.Wav2Vec2Model(tf.Wav2Vec2Config(**_WAVE)).save_pretrained(tmp_path)
    model = tf.Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path, use_weighted_layer_sum=True)
    with pytest.warns(UserWarning, match=r"layer_weights is in no checkpoint, and is neither trained nor saved"):
        veneer.attach(model, veneer.LoRA(rank=2))


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("case", ["distilbert", "deberta", "pooler"])
def test_classifiers_are_loaded_over_a_checkpoint_of_another_task(case, storage, tmp_path):
    read(case, tmp_path / "base", 0)
    options = {"storage": storage, "block_size": 32, "labels": ["a", "b"], "with_tokenizer": False}
    torch.manual_seed(1)
    model, _ = veneer.load(tmp_path / "base", **options)
    note = "are in no checkpoint: trained whole, and saved with the adapter"
    with pytest.warns(UserWarning, match=f"^{', '.join(CASES[case][-1])} {note}"):
        veneer.attach(model, veneer.LoRA(rank=2))
    tiny.train_steps(model, _CLASS)
    veneer.save(model, tmp_path / "adapter")
    torch.manual_seed(2)
    again, _ = veneer.load(tmp_path / "base", **options)
    veneer.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(output(again, _CLASS), output(model, _CLASS), rtol=0, atol=1e-6)


def test_a_merged_model_is_not_new(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj", "lm_head"]))
    veneer.merge(model, reversible=False)
    veneer.attach(model, veneer.LoRA(rank=2, targets=["q_proj"]))
    assert {row.rank for row in veneer.trainable(model).rows} == {2}


@pytest.mark.parametrize("case", ["distilbert", "deberta"])
def test_a_checkpoint_in_codes_of_another_task_is_loaded_as_a_classifier(case, tmp_path):
    written, config, sizes = CASES[case][:3]
    torch.manual_seed(0)
    model = written(config(**sizes)).eval()
    quantise_linear_layers(model, storage="nf4", block_size=32, double_quantisation=False)
    write_folder(model, tmp_path, torch.float32)
    model, _ = veneer.load(tmp_path, labels=["a", "b"], with_tokenizer=False)
    with pytest.warns(UserWarning, match=f"^{', '.join(CASES[case][-1])} are in no checkpoint: trained whole"):
        veneer.attach(model, veneer.LoRA(rank=2))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    tiny.train_steps(model, _CLASS)
