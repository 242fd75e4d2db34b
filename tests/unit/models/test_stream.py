"""Models that are quantised while they stream from the disk: the same model, and never a whole one in memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import tiny
from gguf_file import write_gguf
from tokens import tokenizer
from veneer.errors import ModelError
from veneer.frozen.layers import quantise_linear_layers
from veneer.kernels.serving import serving
from veneer.models import joined
from veneer.models.checkpoint import CLASSES, Checkpoint
from veneer.models.joined import NotTensorByTensor
from veneer.models.load import load
from veneer.models.stream import streamed

pytestmark = pytest.mark.unit

HOW = {"storage": "nf4", "block_size": 32, "double_quantisation": True}
_KIND = {"t5": "seq2seq", "bert": "classification"}


def _streamed(name, path):
    """The model of a folder or GGUF file, and its linear layers in nf4."""
    checkpoint = Checkpoint(path)
    return streamed(checkpoint, _KIND.get(name, "causal"), copy.deepcopy(checkpoint.config), torch.float32, HOW)


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, *tiny.MIXTURES])
def test_a_streamed_model_is_the_one_that_was_loaded_whole_and_quantised(name, tmp_path):
    tiny.build(name).save_pretrained(tmp_path, max_shard_size="30KB")
    ours = _streamed(name, tmp_path)
    wanted = CLASSES[_KIND.get(name, "causal")].from_pretrained(tmp_path)
    quantise_linear_layers(wanted, **HOW)
    ours.eval()
    a, b = ours.state_dict(), wanted.state_dict()
    assert list(a) == list(b)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    buffers = dict(wanted.named_buffers())
    assert [key for key, buffer in ours.named_buffers() if not torch.equal(buffer, buffers[key])] == []
    assert {k: p.requires_grad for k, p in ours.named_parameters()} == {
        k: p.requires_grad for k, p in wanted.named_parameters()
    }
    inputs = tiny.batch(name)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["labels"]
    assert torch.equal(tiny.logits(ours, inputs), tiny.logits(wanted, inputs))
    tied = "lm_head.weight" in (wanted.all_tied_weights_keys or {})
    assert tied == (ours.get_output_embeddings() is not None
                    and ours.get_output_embeddings().weight is ours.get_input_embeddings().weight)  # fmt: skip


def test_a_checkpoint_that_lacks_a_head_is_loaded_whole(tiny_encoder):
    """transformers makes a new one; the rest is quantised as it would be on the way."""
    torch.manual_seed(0)
    model, _ = load(tiny_encoder, "nf4", block_size=32, labels=["bad", "good"])
    torch.manual_seed(0)
    wanted, _ = load(tiny_encoder, labels=["bad", "good"])
    quantise_linear_layers(wanted, **HOW)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(tiny.logits(model, inputs), tiny.logits(wanted, inputs))


def _reason(folder, **config):
    """Why what is in the folder is no model's own tensors one by one; its config says ``config`` besides."""
    checkpoint = Checkpoint(folder)
    changed = copy.deepcopy(checkpoint.config)
    changed.update(config)
    with pytest.raises(NotTensorByTensor) as reason:
        streamed(checkpoint, _KIND.get(changed.model_type, "causal"), changed, torch.float32, HOW)
    return str(reason.value)


def test_why_a_checkpoint_is_loaded_whole_is_said(tiny_folder, tiny_encoder, tmp_path, monkeypatch):
    others = "it has other names, such as embeddings.LayerNorm.bias where its model has bert.embeddings.LayerNorm.bias"
    assert _reason(tiny_encoder) == others
    load(tiny_encoder, labels=["bad", "good"])[0].save_pretrained(tmp_path / "classifier")
    tensors = load_file(tmp_path / "classifier" / "model.safetensors")
    headless = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    save_file(headless, tmp_path / "classifier" / "model.safetensors", metadata={"format": "pt"})
    assert _reason(tmp_path / "classifier") == "it lacks classifier.bias, classifier.weight"
    assert _reason(tiny_folder, num_hidden_layers=1).startswith(
        "its model has no place for model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
    )
    shapes = (
        "its model has another shape for model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight, "
    )
    assert _reason(tiny_folder, intermediate_size=96).startswith(shapes)
    tiny.build("mixtral").save_pretrained(tmp_path / "mixture")
    monkeypatch.setattr(joined, "is_joining", lambda conversion: False)
    assert _reason(tmp_path / "mixture") == "its tensors are joined or turned as they are read"
    (tmp_path / "mixture" / "model.safetensors").unlink()
    assert _reason(tmp_path / "mixture") == "it has no safetensors file"


def test_why_a_gguf_file_is_loaded_whole_is_said(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", _llama(), tokenizer())
    monkeypatch.setitem(gguf.MODEL_ARCH_NAMES, gguf.MODEL_ARCH.LLAMA, "renamed")
    assert _reason(tmp_path / "tiny.gguf") == "gguf has no names for the tensors of a llama"
    real = gguf.GGUFReader.__init__

    def swapped(self, *arguments):
        real(self, *arguments)
        self.byte_order = "S"

    monkeypatch.setattr(gguf.GGUFReader, "__init__", swapped)
    assert _reason(tmp_path / "tiny.gguf") == "it is a GGUF file of the other byte order"


def test_the_reason_is_a_note_of_the_checkpoint(tiny_encoder, tiny_folder):
    checkpoint = Checkpoint(tiny_encoder)
    load(checkpoint, "nf4", labels=["bad", "good"])
    assert len(checkpoint.notes) == 1
    said = "was loaded whole before it was quantised: it has other names, such as embeddings.LayerNorm.bias where its"
    assert checkpoint.notes[0].startswith(f"{tiny_encoder} {said}")
    checkpoint = Checkpoint(tiny_folder)
    load(checkpoint, "nf4")
    assert checkpoint.notes == []


@pytest.mark.parametrize("ours", ["quantise", "linear_layers", "_require_one_to_one", "_tensors", "_fill", "_finished"])
def test_a_fault_of_ours_is_raised_as_it_is(tiny_folder, monkeypatch, ours):
    """It was no reason to load the whole model in fp32 without a word."""

    def fault(*_, **__):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(f"veneer.models.stream.{ours}", fault)
    with pytest.raises(RuntimeError, match=r"^a fault of ours$"):
        load(tiny_folder, "nf4")


@pytest.mark.parametrize("damage", ["cut", "index", "shard", "config"])
def test_a_damaged_file_is_refused_in_the_same_words_whole_and_streamed(tmp_path, damage):
    tiny.build("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    tokenizer().save_pretrained(tmp_path)
    shard, index = sorted(tmp_path.glob("*-of-*.safetensors"))[1], tmp_path / "model.safetensors.index.json"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "index":
        index.write_text("{")
    elif damage == "shard":
        shard.unlink()
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "none-such"}))
    refusals = []
    for storage in ("fp32", "nf4"):
        with pytest.raises(ModelError, match=r" cannot be read as a model: \S") as refusal:
            load(tmp_path, storage)
        refusals.append(str(refusal.value))
    if damage != "shard":  # of which transformers says that the hub has no such file
        assert refusals[0] == refusals[1]


def test_the_generation_config_comes_along(tmp_path):
    model = tiny.build("llama")
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    model.save_pretrained(tmp_path)
    assert _streamed("llama", tmp_path).generation_config.temperature == 0.3


def test_a_half_precision_checkpoint_is_quantised_from_its_values(tmp_path):
    tiny.build("llama").bfloat16().save_pretrained(tmp_path)
    ours = _streamed("llama", tmp_path)
    assert ours.lm_head.weight.dtype == torch.float32
    assert ours.model.layers[0].self_attn.q_proj.dtype == torch.float32
    wanted = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    quantise_linear_layers(wanted, **HOW)
    inputs = tiny.batch("llama")
    assert torch.equal(tiny.logits(ours, inputs), tiny.logits(wanted, inputs))


def _llama(tied=False, hidden=64, layers=2):
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=tied,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


_TYPES = gguf.GGMLQuantizationType


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [None, _TYPES.F16, _TYPES.BF16, _TYPES.Q8_0, _TYPES.Q4_1])
def test_a_streamed_gguf_file_is_the_one_that_was_loaded_whole_and_quantised(kind, tied, tmp_path):
    """Queries and keys turned back, a head that is tied or not, whatever the file keeps its matrices in."""
    torch.manual_seed(0)
    write_gguf(tmp_path / "tiny.gguf", _llama(tied), tokenizer(), kind)
    ours = _streamed("llama", tmp_path / "tiny.gguf").eval()
    wanted = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    quantise_linear_layers(wanted, **HOW)
    a, b = ours.state_dict(), wanted.state_dict()
    assert list(a) == list(b)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    inputs = tiny.batch("llama")
    assert torch.equal(tiny.logits(ours, inputs), tiny.logits(wanted, inputs))


def test_an_architecture_whose_tensors_gguf_joins_is_loaded_whole(tmp_path):
    """Which one has a reader of its own in transformers is read off the file."""
    write_gguf(tmp_path / "tiny.gguf", _llama(), tokenizer())
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "other.gguf").write_bytes(whole.replace(b"llama", b"bloom"))
    config = Checkpoint(tmp_path / "tiny.gguf").config
    with pytest.raises(NotTensorByTensor, match=r"^a GGUF file of bloom has tensors that are split or joined"):
        streamed(Checkpoint(tmp_path / "other.gguf"), "causal", config, torch.float32, HOW)


_MEASURE = """
import sys, torch
from pathlib import Path
from veneer.models.checkpoint import Checkpoint
from veneer.models.stream import streamed
def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
torch.set_num_threads(1)
warm = torch.randn(64, 64) @ torch.randn(64, 64)
paths = [Path(path) for path in sys.argv[1:]]
how = {"storage": "nf4", "block_size": 64, "double_quantisation": True}
for path in paths:
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    before = high_water()
    model = streamed(checkpoint, "causal", config, torch.float32, how)
print(high_water() - before, sum(tensor.nbytes for tensor in model.state_dict().values()))
"""


def _big(path, hidden, layers):
    with torch.device("meta"):
        model = _llama(hidden=hidden, layers=layers)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    if path.suffix == ".gguf":
        write_gguf(path, model, tokenizer(), _TYPES.Q8_0)
    else:
        model.save_pretrained(path)
    return max(parameter.nbytes for parameter in model.parameters()), sum(p.nbytes for p in model.parameters())


@pytest.mark.skipif(serving() == "reference", reason="without C++ kernels quantising takes some more room")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_the_peak_is_the_result_and_two_tensors(tmp_path, suffix):
    """In a process of its own, after a tiny model has brought in all code."""
    small, big = tmp_path / f"small{suffix}", tmp_path / f"big{suffix}"
    _big(small, 64, 1)
    tensor, whole = _big(big, 1024, 8)
    # Large tensors in mappings of their own: where the heap has holes differs from run to run.
    alone = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, small, big], env=alone, capture_output=True, text=True, check=True
    )
    peak, result = map(int, done.stdout.split())
    assert result < 0.15 * whole
    # A few megabytes are the chunk that is quantised at once, and torch's own.
    assert peak <= result + 2 * tensor + 12 * 2**20, f"{peak:,} for {result:,}; a tensor has {tensor:,}"
    assert peak < 0.4 * whole


@pytest.mark.skipif(serving() == "reference", reason="without C++ kernels quantising takes some more room")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_of_a_mixture_the_peak_is_the_result_and_one_stack_of_codes(tmp_path):
    """The experts of a layer have 34 MB in fp32, which are never in memory together."""
    for name, hidden in (("small", 64), ("big", 512)):
        config = tf.Qwen3MoeConfig(
            vocab_size=64, hidden_size=hidden, moe_intermediate_size=hidden // 2, intermediate_size=64, head_dim=32,
            num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, num_experts=32, eos_token_id=1,
        )  # fmt: skip
        tf.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / name)
    alone = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, tmp_path / "small", tmp_path / "big"], env=alone, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    peak, result = map(int, done.stdout.split())
    stack = 32 * 512 * 512 * 5 // 8
    assert peak <= result + 2 * stack + 12 * 2**20, f"{peak:,} for {result:,}; a stack has {stack:,}"


def test_a_tensor_that_is_copied_keeps_no_file_open(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    model = _streamed("llama", tmp_path)
    maps = Path("/proc/self/maps").read_text() if sys.platform == "linux" else ""
    assert str(tmp_path) not in maps
    assert model is not None
