"""Loading: every kind of source gives the same model, and what is damaged or incomplete is named."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
import veneer
from gguf_file import write_gguf
from tokens import tokenizer
from veneer.errors import ConfigError, ModelError
from veneer.frozen.layers import storage_of
from veneer.frozen.weight import QuantisedLinear
from veneer.models.checkpoint import Checkpoint
from veneer.models.library import call_library, quiet
from veneer.models.load import load

pytestmark = pytest.mark.unit

IDS = torch.tensor([[72, 69, 76, 76, 79]])


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """The tiny model's folder, to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A tiny Llama as a GGUF file, and the model and tokenizer that were written into it."""
    made = tokenizer(merges=(("h", "e"), ("l", "l")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.LlamaConfig(
            vocab_size=len(made), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, eos_token_id=made.eos_token_id,
        )  # fmt: skip
        model = tf.LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model, made)
    return path, model, made


def _logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def _refused(source, match, kind=ModelError, **options):
    with pytest.raises(kind, match=match):
        load(source, **options)


def test_a_folder(tiny_folder):
    model, made = load(tiny_folder)
    assert torch.equal(_logits(model), _logits(tf.AutoModelForCausalLM.from_pretrained(tiny_folder)))
    assert not model.training
    assert model.name_or_path == made.name_or_path == str(tiny_folder), "where an adapter finds its base again"
    assert made.decode(made("hello").input_ids) == "hello"


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp16"])
def test_storages(tiny_folder, storage):
    model, _ = load(tiny_folder, storage)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[storage]
    assert {p.dtype for p in model.parameters() if p.dim() > 1} == {wanted}
    torch.testing.assert_close(_logits(model).float(), _logits(load(tiny_folder)[0]), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("storage", "worst"), [("nf4", 0.05), ("fp4", 0.09), ("int4", 0.07), ("int8", 1e-3)])
def test_quantised_storages(tiny_folder, storage, worst):
    model, _ = load(tiny_folder, storage, block_size=32, double_quantisation=False)
    assert storage_of(model) == {"storage": storage, "block_size": 32, "double_quantisation": False}
    kinds = {name.rsplit(".", 1)[-1]: type(module) for name, module in model.named_modules()}
    assert (kinds["q_proj"], kinds["down_proj"], kinds["lm_head"]) == (QuantisedLinear, QuantisedLinear, nn.Linear)
    plain = _logits(load(tiny_folder)[0])
    error = (_logits(model) - plain).square().mean() / plain.square().mean()
    assert 1e-7 < float(error) < worst


def test_a_storage_or_task_that_does_not_exist(tiny_folder):
    _refused(tiny_folder, r"^storage = 'fp64' is not one of fp32, bf16, fp16, nf4, fp4, int4, int8\.$", ConfigError,
             storage="fp64")  # fmt: skip
    _refused(tiny_folder, r"^block_size = 48 is not one of 32, 64, 128, .*, 4096\.$", ConfigError, block_size=48)
    _refused(
        tiny_folder,
        r"^task = 'poetry' is not one of auto, causal, seq2seq, classification, multi-label, regression\.$",
        ConfigError, task="poetry",
    )  # fmt: skip


def test_a_gguf_file(gguf):
    path, written, made = gguf
    model, read = load(path)
    torch.testing.assert_close(_logits(model), _logits(written), rtol=0, atol=1e-6)
    assert read("hello é").input_ids == made("hello é").input_ids
    assert (read.eos_token, read.pad_token, read.chat_template) == ("<|end|>", "<|end|>", made.chat_template)
    assert model.config.pad_token_id == made.eos_token_id
    assert Checkpoint(path).generates_text


def test_a_gguf_models_folder_gives_the_same_logits(gguf, tmp_path):
    """transformers calls a model from a GGUF file quantised, and refuses to save it; its weights are plain by then."""
    for part in load(gguf[0]):
        part.save_pretrained(tmp_path / "saved")
    model, read = load(tmp_path / "saved")
    assert torch.equal(_logits(model), _logits(load(gguf[0])[0]))
    assert read("hello").input_ids == gguf[2]("hello").input_ids


def test_a_gguf_base_is_trained_in_4_bits_and_merged(gguf, tmp_path):
    model, _ = load(gguf[0], "nf4")
    veneer.attach(model, veneer.LoRA(rank=2))
    tiny.train_steps(model, {"input_ids": IDS, "labels": IDS})
    adapted = _logits(model)
    veneer.merge(model)
    model.save_pretrained(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_logits(again), adapted, rtol=0, atol=1e-5)


def test_a_hub_id_from_the_standard_cache(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    model, _ = load("someone/tiny")
    assert torch.equal(_logits(model), _logits(load(tiny_folder)[0]))
    assert model.name_or_path == "someone/tiny"


def test_an_encoder_as_a_classifier(tiny_encoder):
    assert not Checkpoint(tiny_encoder).generates_text
    model, _ = load(tiny_encoder, labels=["bad", "fair", "good"])
    assert type(model) is tf.BertForSequenceClassification
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert _logits(model).shape == (1, 3)
    body = tf.BertModel.from_pretrained(tiny_encoder)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, body.embeddings.word_embeddings.weight)
    _refused(
        tiny_encoder,
        r"is a BertModel, which generates no text; give the names of its classes \(labels\) to train it as a classif",
    )


def test_a_classifiers_head_is_kept_unless_the_classes_are_others(tiny_encoder, tmp_path):
    model, made = load(tiny_encoder, labels=["bad", "good"])
    for part in (model, made):
        part.save_pretrained(tmp_path / "c")
    again, _ = load(tmp_path / "c")
    assert torch.equal(_logits(again), _logits(model))
    assert again.config.id2label == {0: "bad", 1: "good"}
    other, _ = load(tmp_path / "c", labels=["a", "b", "c"])
    assert _logits(other).shape == (1, 3)
    quantised, _ = load(tmp_path / "c", "nf4")
    assert torch.equal(quantised.classifier.weight, model.classifier.weight), "a head stays as it is"


def test_a_language_model_as_a_classifier(tiny_folder):
    model, _ = load(tiny_folder, labels=["no", "yes"])
    assert type(model) is tf.LlamaForSequenceClassification
    assert _logits(model).shape == (1, 2)


def test_an_encoder_decoder(tmp_path):
    made = tokenizer()
    config = tf.T5Config(vocab_size=len(made), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                         decoder_start_token_id=0)  # fmt: skip
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    assert type(load(tmp_path)[0]) is tf.T5ForConditionalGeneration
    assert Checkpoint(tmp_path).generates_text


def test_a_checkpoint_without_some_of_its_weights(copy):
    """transformers fills them with random values and a warning."""
    tensors = load_file(copy / "model.safetensors")
    missing = [name for name in tensors if "q_proj" in name or "k_proj" in name]
    for name in missing:
        del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    _refused(
        copy,
        r"^The checkpoint of .*copy lacks model\.layers\.0\.self_attn\.k_proj\.weight, model\.layers\.0\.self_attn\."
        r"q_proj\.weight, model\.layers\.1\.self_attn\.k_proj\.weight and 1 more; it is incomplete, or belongs to",
    )


def test_a_checkpoint_of_another_shape(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 64, "num_hidden_layers": 1}))
    _refused(
        copy,
        r"has another shape for model\.layers\.0\.mlp\.down_proj\.weight, .*gate_proj\.weight, .*up_proj\.weight than "
        r"its config says; it is incomplete, or belongs to another config\.json\.$",
    )


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_weights_file_that_was_cut_short(copy, size):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    _refused(copy, r"copy cannot be read as a model: Error while deserializing header")


def test_no_weights_at_all(copy):
    (copy / "model.safetensors").unlink()
    _refused(copy, r"copy cannot be read as a model: .*no file named model\.safetensors")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", r"config\.json' is not a valid JSON file"),
        ("[]", "Unrecognized model"),
        ("{}", "Should have a `model_type` key"),
        ('{"model_type": "none-such"}', "has model type `none-such` but Transformers does not recognize"),
    ],
)
def test_a_config_that_is_none(copy, text, reason):
    (copy / "config.json").write_text(text)
    _refused(copy, rf"copy cannot be read as a model: .*{reason}")


def test_a_gguf_file_that_was_cut_short(gguf, tmp_path):
    whole = gguf[0].read_bytes()
    for number, broken in enumerate((b"", b"GGUF", whole[:200], whole[:-1000], b"\xff" * 500)):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(broken)
        _refused(path, rf"{number}\.gguf cannot be read as a model: \S+")


def test_a_model_without_a_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{")
    _refused(copy, r"copy has no tokenizer that can be read \(tokenizer\.json\): \S+")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    _refused(copy, r"copy has no tokenizer that can be read \(tokenizer\.json\): Couldn't instantiate")


def test_a_library_that_panics_over_a_file():
    """Rust's panics reach Python as an exception that is no Exception."""
    panic = type("PanicException", (BaseException,), {})

    def read():
        raise panic("range end index 9 out of range")

    with pytest.raises(ModelError, match=r"^x cannot be read: range end index 9 out of range$"):
        call_library(read, "x cannot be read")

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_library(stop, "x cannot be read")


def test_a_model_whose_missing_tokenizer_would_be_an_empty_one(tiny_encoder, tmp_path):
    """transformers makes up one without a word in it for some architectures."""
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    for file in (tmp_path / "encoder").glob("tokenizer*"):
        file.unlink()
    _refused(
        tmp_path / "encoder",
        r"encoder has no tokenizer: save one beside the model with tokenizer\.save_pretrained\.$",
        labels=["a", "b"],
    )


def test_what_transformers_says_while_it_loads_is_silenced_and_its_settings_come_back(capsys):
    logging = tf.utils.logging
    for bars in (True, False):
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        before = logging.get_verbosity()
        with pytest.raises(ZeroDivisionError), quiet():
            logging.get_logger("transformers").warning("noise") or 1 / 0
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (before, bars)
    logging.enable_progress_bar()
    assert capsys.readouterr().err == ""


def test_models_loaded_in_threads_leave_the_processs_streams_and_logs(tiny_folder):
    before, verbosity = sys.stderr, tf.utils.logging.get_verbosity()
    bars = tf.utils.logging.is_progress_bar_enabled()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: veneer.load(str(tiny_folder)), range(8)))
    assert sys.stderr is before
    assert tf.utils.logging.get_verbosity() == verbosity
    assert tf.utils.logging.is_progress_bar_enabled() == bars
