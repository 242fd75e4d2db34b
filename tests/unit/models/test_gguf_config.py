"""A GGUF file and the model that it was written from give the same logits, architecture by architecture, key by key."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import gguf
import pytest
import torch
import transformers as tf

import veneer
from gguf_kinds import GROUPED, LLAMA3, MODELS, TOKENIZER, llama
from gguf_models import write_model
from tokens import tokenizer
from veneer.errors import ModelError
from veneer.frozen.layers import quantise_linear_layers
from veneer.models.checkpoint import Checkpoint
from veneer.models.gguf_config import _BUILDERS, READ_BY_TRANSFORMERS, gguf_config

pytestmark = pytest.mark.unit

CLOSE = 5e-6  # relative: norms are kept as 1 + w, some weights as their exponentials


@functools.cache
def _made(name, wide=0.15):
    """The model, with weights large enough that a mistake shows."""
    torch.manual_seed(0)
    model = MODELS[name]().eval() if isinstance(name, str) else name().eval()
    for key, parameter in model.named_parameters():
        if not key.endswith(("A_log", ".D")):
            parameter.data.normal_(0, wide).add_(float(parameter.dim() == 1 and "norm" in key))
    return model


def _logits(model, length=90):
    ids = torch.arange(length)[None] * 7 % len(TOKENIZER)
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(ids, **more).logits


def _off(a, b, **more):
    a, b = _logits(a, **more), _logits(b, **more)
    return float((a - b).norm() / b.norm())


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_that_it_was_written_from(name, file):
    model = _made(name)
    write_model(file, model, TOKENIZER)
    read = veneer.load(file)[0]
    assert _off(read, model) < CLOSE
    assert type(read).__name__.startswith(type(model).__name__.replace("Mistral", "Llama"))
    for key, tensor in model.state_dict().items():
        assert (read.state_dict()[key] - tensor).abs().max() < 1e-6, key
    again = veneer.load(file)[0]
    assert _off(again, read) < CLOSE, "the copy in the cache"  # to the bit only where weights lie as aligned in memory
    for key, tensor in read.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["llama", "falcon 40B", "gemma3, linear", "phi3, longrope", "qwen2 mixture", "bloom"])
def test_in_4_bits_it_is_the_model_that_is_read_whole_and_quantised(name, file):
    write_model(file, _made(name), TOKENIZER)
    checkpoint = Checkpoint(file)
    wanted = veneer.load(checkpoint)[0]
    quantise_linear_layers(wanted, storage="nf4", block_size=64, double_quantisation=True)
    checkpoint = Checkpoint(file.rename(file.with_name("other.gguf")))
    assert _off(veneer.load(checkpoint, "nf4")[0], wanted) == 0
    assert [note.rpartition(": ")[2] for note in checkpoint.notes if "whole" in note] == (
        []
        if name not in ("qwen2 mixture", "bloom")
        else [f"a GGUF file of {checkpoint.gguf.architecture} has tensors that are split or joined as they are read."]
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotation_of_llama_3(factor, file):
    """Its own, of 3.1 and 3.2; the head is as wide as theirs, so each kind of frequency is in it."""
    rope = {**LLAMA3, "factor": factor}
    model = _made(lambda: llama(hidden_size=128, num_attention_heads=1, num_key_value_heads=1, rope_parameters=rope))
    write_model(file, model, TOKENIZER)
    read = veneer.load(file)[0]
    assert read.config.rope_parameters == rope
    assert _off(read, model, length=2500) < CLOSE


@pytest.mark.parametrize("change", [{"low_freq_factor": 2.0}, {"original_max_position_embeddings": 4000}])
def test_another_rotation_of_llama_3s_kind(change, file):
    model = _made(
        lambda: llama(
            hidden_size=128, num_attention_heads=1, num_key_value_heads=1, rope_parameters={**LLAMA3, **change}
        )
    )
    write_model(file, model, TOKENIZER)
    read = veneer.load(file)[0]
    assert read.config.rope_parameters["rope_type"] == "llama3"
    assert _off(read, model, length=2500) < CLOSE


def test_factors_that_are_of_no_known_rotation_are_used_as_they_are(file):
    """Tiny heads have too few frequencies for Llama 3's parameters to be seen in them."""
    model = _made(lambda: llama(rope_parameters={**LLAMA3, "original_max_position_embeddings": 64}))
    write_model(file, model, TOKENIZER)
    read = veneer.load(file)[0]
    assert read.config.rope_parameters["rope_type"] == "longrope"
    assert _off(read, model) < CLOSE


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_queries_scale_of_gemmas_27b_is_known_by_its_layers(name, layers, file):
    write_model(file, _made(name), TOKENIZER)
    header = Checkpoint(file).gguf
    assert gguf_config(header).query_pre_attn_scalar == 16, "the size of a head"
    header.metadata[f"{name}.block_count"] = layers
    header.tensors |= {f"blk.{layer}.attn_q.weight": None for layer in range(layers)}
    assert gguf_config(header).query_pre_attn_scalar == 8, "hidden_size / heads"


def _read(file, name="llama", **more):
    write_model(file, _made(name), TOKENIZER, **more)
    return veneer.load(file)[0]


def test_what_early_converters_left_out_has_llama_cpps_default(file):
    plain = _made("llama, all heads have keys")
    left_out = (
        "attention.key_length",
        "attention.value_length",
        "attention.head_count_kv",
        "rope.freq_base",
        "vocab_size",
    )
    write_model(file, plain, TOKENIZER, without=left_out)
    assert _off(veneer.load(file)[0], plain) < CLOSE


def test_a_model_that_is_named_mistral(file):
    assert _off(_read(file, **{"general.name": "mistral"}), _made("llama")) < CLOSE


@pytest.mark.parametrize("name", ["falcon 7B", "bloom"])
def test_a_head_in_the_file_of_a_model_whose_head_is_the_embedding(name, file):
    """llama.cpp's converter writes it, too; where it is another one, it is the head."""
    embedding = _made(name).get_input_embeddings().weight.detach()
    write_model(file, _made(name), TOKENIZER, tensors={"output.weight": embedding})
    assert _off(veneer.load(file)[0], _made(name)) < CLOSE
    write_model(file, _made(name), TOKENIZER, tensors={"output.weight": embedding.flip(0)})
    assert torch.allclose(_logits(veneer.load(file)[0]), _logits(_made(name)).flip(2), rtol=1e-4, atol=1e-5)


def test_other_spellings_of_the_same(file):
    linear = _made("llama, linear")
    write_model(file, linear, TOKENIZER, without=("rope.scaling.type",))
    assert _off(veneer.load(file)[0], linear) < CLOSE, "linear is llama.cpp's default"
    write_model(
        file, linear, TOKENIZER, without=("rope.scaling.type", "rope.scaling.factor"), **{"rope.scale_linear": 4.0}
    )
    assert _off(veneer.load(file)[0], linear) < CLOSE
    pattern = {"attention.sliding_window_pattern": [True, True, True, True, True, False, True]}
    assert _off(_read(file, "gemma3", **pattern), _made("gemma3")) < CLOSE
    other = _read(file, "gemma3", **{"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 5000.0})
    assert other.config.layer_types == ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
    assert other.config.rope_parameters["sliding_attention"]["rope_theta"] == 5000.0
    yarn = _read(file, "llama, yarn", **{"rope.scaling.attn_factor": 1.5, "rope.scaling.yarn_ext_factor": 1.0})
    assert yarn.config.rope_parameters["attention_factor"] == pytest.approx(1.5 * (0.1 * math.log(4) + 1))
    log = _read(file, "llama, yarn", **{"rope.scaling.yarn_log_multiplier": 0.5}).config.rope_parameters
    assert (log["mscale"], log["mscale_all_dim"]) == (1.0, 0.5)


USE = "load the model that the file was made of"


@pytest.mark.parametrize(
    ("name", "more", "refusal"),
    [
        ("llama", {"attention.scale": 0.5}, f"holds llama.attention.scale, which .* for the architecture llama; {USE}"),
        ("llama", {"expert_count": 4}, f"llama.expert_count = 4, which Veneer does not know how to use .*; {USE}"),
        ("llama", {"rope.dimension_count": 4}, "llama.rope.dimension_count = 4, which"),
        ("llama", {"attention.value_length": 4}, "llama.attention.value_length = 4, which"),
        ("llama", {"rope.scaling.type": "dynamic"}, "llama.rope.scaling.type = 'dynamic', which"),
        ("llama, yarn", {"rope.scaling.yarn_ext_factor": 0.5}, "llama.rope.scaling.yarn_ext_factor = 0.5, which"),
        ("llama", {"attention.sliding_window": 20}, "llama.attention.sliding_window = 20, which"),
        ("llama", {"feed_forward_length": [48, 24]}, "that llama.feed_forward_length differs from layer to layer"),
        ("llama", {"clip.projector_type": "mlp"}, "holds clip.projector_type, which"),
        ("llama", {"split.count": 3}, "is one of 3 files of a model; join them first, with llama-gguf-split --merge"),
        ("llama", {"general.type": "adapter"}, "is no model: its general.type is 'adapter'"),
        ("phi3", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "rope.scaling.type = .linear., which"),
        ("qwen3 mixture, not 768 wide", {"expert_weights_scale": 2.5}, "qwen3moe.expert_weights_scale = 2.5, which"),
        ("starcoder2", {"attention.key_length": 16, "attention.value_length": 16}, "starcoder2.attention.key_length"),
        ("stablelm", {"use_parallel_residual": True}, "stablelm.use_parallel_residual = True, which"),
        ("mamba", {"ssm.dt_b_c_rms": True}, "mamba.ssm.dt_b_c_rms = True, which"),
        ("mamba", {"ssm.inner_size": 40}, "mamba.ssm.inner_size = 40, which"),
        ("bloom", {"feed_forward_length": 40}, "bloom.feed_forward_length = 40, which"),
        ("bloom", {"attention.head_count_kv": 2}, "bloom.attention.head_count_kv = 2, which"),
    ],
)  # fmt: skip
def test_what_a_file_says_and_its_model_cannot_have_is_refused_by_name(name, more, refusal, file):
    with pytest.raises(ModelError, match=refusal):
        _read(file, name, **more)


def test_layers_that_the_file_has_no_tensors_of_are_refused_before_they_are_made(file):
    with pytest.raises(ModelError, match=r"tiny\.gguf says that it has 2,147,483,649 layers, and holds tensors of 2; "):
        _read(file, block_count=2**31 + 1)


def test_a_file_that_lacks_a_key_is_refused_by_name(file):
    with pytest.raises(ModelError, match=r"tiny\.gguf lacks llama\.embedding_length; it is incomplete\.$"):
        _read(file, without=("embedding_length",))


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_a_tensor_that_the_model_has_no_place_for_is_refused_by_name(storage, file):
    more = {"blk.0.attn_q_norm.weight": torch.ones(8), "blk.1.attn_sinks.weight": torch.ones(4)}
    write_model(file, _made("llama"), TOKENIZER, tensors=more)
    refusal = (
        r"tiny\.gguf holds blk\.0\.attn_q_norm\.weight, blk\.1\.attn_sinks\.weight, which its model "
        rf"\(LlamaForCausalLM\) has no place for; {USE}\.$"
    )
    with pytest.raises(ModelError, match=refusal):
        veneer.load(file, storage)


def test_factors_of_a_rotation_where_none_is_are_refused(file):
    write_model(file, _made("bloom"), TOKENIZER, tensors={"rope_freqs.weight": torch.ones(4)})
    with pytest.raises(ModelError, match=r"holds rope_freqs\.weight, which Veneer does not know .* architecture bloom"):
        veneer.load(file)
    write_model(file, _made("llama"), TOKENIZER, tensors={"rope_freqs.weight": torch.full((3,), 2.0)})
    with pytest.raises(ModelError, match=r"llama\.rope\.dimension_count = 8"):
        veneer.load(file)


def test_an_architecture_that_is_not_read_is_refused_by_name(file):
    write_model(file, _made("llama"), TOKENIZER)
    file.write_bytes(file.read_bytes().replace(b"llama", b"plamo"))
    refusal = (
        r"is a GGUF file of the architecture 'plamo', which cannot be read; what can be: bloom, falcon, gemma2, .*\.$"
    )
    with pytest.raises(ModelError, match=refusal):
        veneer.load(file)


def test_remarks_of_those_who_quantised_a_file_change_nothing(file):
    more = {"general.author": "me", "general.quantized_by": "you"}
    assert _off(_read(file, **more), _made("llama")) < CLOSE


def test_a_classifier_has_no_use_for_the_head(file):
    write_model(file, _made("llama"), TOKENIZER)
    model = veneer.load(file, labels=["bad", "good"])[0]
    assert model.num_labels == 2
    assert torch.equal(model.model.norm.weight, _made("llama").model.norm.weight)


def test_how_text_is_split_is_as_the_file_says_or_it_is_said_that_it_is_not(file):
    """Two line ends are one token where they are not torn apart, as by Qwen 2's expression."""
    line_ends = tokenizer(merges=(("Ċ", "Ċ"), (";", "ĊĊ")))
    config = tf.LlamaConfig(**{**GROUPED, "vocab_size": len(line_ends)})
    ids = {}
    for split in ("gpt-2", "stablelm2", "qwen2", "falcon"):
        write_model(file, tf.LlamaForCausalLM(config), line_ends, split=split)
        checkpoint = Checkpoint(file)
        ids[split] = len(checkpoint.tokenizer()("a;\n\nb", add_special_tokens=False).input_ids)
        assert bool(checkpoint.notes) == (split == "falcon")
    assert ids == {"gpt-2": 5, "stablelm2": 3, "qwen2": 3, "falcon": 5}
    assert "splits text as 'falcon' (tokenizer.ggml.pre), which is not known here" in checkpoint.notes[0]
    checkpoint.tokenizer()
    assert len(checkpoint.notes) == 1


def test_a_large_vocabulary_is_passed_over(file):
    """Its words, types and merges; what comes after them in the file is read."""
    words = tokenizer(merges=tuple((chr(a), chr(b)) for a in range(65, 123) for b in range(97, 123)))
    assert len(words) > 1200
    config = tf.LlamaConfig(**{**GROUPED, "vocab_size": len(words)})
    write_model(file, tf.LlamaForCausalLM(config), words)
    header, reader = Checkpoint(file).gguf, gguf.GGUFReader(file)
    assert set(header.metadata) == set(reader.fields)
    assert header.metadata["tokenizer.ggml.tokens"] is None
    assert header.metadata["tokenizer.chat_template"] == words.chat_template
    assert {name: one.offset for name, one in header.tensors.items()} == {t.name: t.data_offset for t in reader.tensors}


def test_the_documents_name_each_architecture():
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    assert [name for name in (*_BUILDERS, *READ_BY_TRANSFORMERS) if f"`{name}`" not in text] == []
