"""A GGUF file that Veneer writes is, read again, the model to the bit: architecture by architecture; what it cannot say
is refused by name."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

import veneer
from gguf_kinds import GROUPED, LLAMA3, MODELS, ROPE, TOKENIZER, WIDE, WRITABLE, YARN, of
from veneer.errors import ModelError
from veneer.models import gguf_types
from veneer.models.checkpoint import Checkpoint
from veneer.models.gguf_tokenizer import tokenizer_keys
from veneer.models.gguf_types import TYPES
from veneer.models.gguf_write import Draft, GgufModel

pytestmark = pytest.mark.unit


def build(make):
    """Weights that a checkpoint in 16 bits may have, as nearly all that are published do."""
    torch.manual_seed(0)
    model = make().eval()
    for key, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.15).add_(float(parameter.dim() == 1 and "norm" in key))
        parameter.data = parameter.data.bfloat16().float()
    model.tie_weights()
    return model


def write(file, model, storage="fp32", words=TOKENIZER, **general):
    state = model.state_dict()
    keys = tokenizer_keys(words, model.config.vocab_size, None)
    draft = Draft(GgufModel("tiny", model.config, state.__getitem__, keys, general), storage)
    draft.write(file)
    return draft


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("name", WRITABLE)
def test_it_is_read_again_to_the_bit(name, file):
    model = build(WRITABLE[name])
    write(file, model)
    read = veneer.load(file)[0]
    own = model.state_dict()
    assert read.state_dict().keys() == own.keys()
    assert [key for key, tensor in read.state_dict().items() if not torch.equal(tensor, own[key])] == []
    ids = torch.arange(60)[None] * 7 % model.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("storage", [name for name in TYPES if name != "fp32"])
def test_each_type_is_what_gguf_itself_makes_of_it(storage, file):
    model = build(WRITABLE["llama"])
    draft = write(file, model, storage)
    read, own, rounds = veneer.load(file)[0].state_dict(), model.state_dict(), storage.startswith("q")
    kinds = {name: stored.type for name, stored in Checkpoint(file).gguf.tensors.items()}
    expected = {"blk.0.attn_norm.weight": "F32", "blk.0.ffn_up.weight": TYPES[storage][0].name}
    if rounds:
        expected |= {"token_embd.weight": "Q8_0", "output.weight": "Q8_0", "blk.0.ffn_down.weight": "F16"}
    assert {name: kinds[name].name for name in expected} == expected
    names = {
        "embed_tokens": "token_embd",
        "layers.1.mlp.up_proj": "blk.1.ffn_up",
        "layers.1.mlp.down_proj": "blk.1.ffn_down",
    }
    for key, name in names.items():
        kind, weight = kinds[f"{name}.weight"], own[f"model.{key}.weight"].numpy()
        wanted = gguf.dequantize(gguf.quantize(weight, kind), kind)
        np.testing.assert_array_equal(read[f"model.{key}.weight"].numpy(), wanted)
    assert [note for note in draft.notes if "rows are no multiple of 32 values" in note] == (
        ["blk.0.ffn_down.weight, blk.1.ffn_down.weight: rows are no multiple of 32 values, so fp16 keeps them."]
        * rounds
    )


def test_a_value_beyond_a_type_is_refused(file):
    model = build(WRITABLE["llama"])
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = 7e4
    with pytest.raises(
        ModelError, match=r"blk\.0\.ffn_up\.weight has a value of 7e\+04, which F16 cannot hold; use bf16"
    ):
        write(file, model, "fp16")
    assert not file.exists()
    write(file, model, "bf16")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_no_number_is_refused_where_it_would_spoil_a_block(value, file):
    model = build(WRITABLE["llama"])
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight has a value of (nan|inf), which Q4_0 cannot hold"):
        write(file, model, "q4_0")


def test_a_tensor_is_written_in_parts_with_the_bytes_of_the_whole(monkeypatch):
    values = torch.randn(37, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    for kind in (stored for stored, _ in TYPES.values()):
        monkeypatch.setattr(gguf_types, "_AT_ONCE", 5 * 96)
        parts = [part.tobytes() for part in gguf_types.packed("a.weight", values, kind)]
        assert len(parts) == 8
        assert b"".join(parts) == gguf.quantize(values.float().numpy(), kind).tobytes()


def test_other_architectures_are_refused_with_those_that_are_written(file):
    for name in ("bloom", "falcon 7B", "qwen3 mixture, not 768 wide", "mamba"):
        with pytest.raises(
            ModelError, match=r"is a \w+, which Veneer does not write as GGUF; it writes llama, mistral,"
        ):
            write(file, build(MODELS[name]))


@pytest.mark.parametrize(
    ("make", "refusal"),
    [
        (lambda: of("llama", **GROUPED, hidden_act="relu"), "hidden_act = 'relu'"),
        (lambda: of("gemma2", **WIDE, query_pre_attn_scalar=5, sliding_window=20), "query_pre_attn_scalar = 5"),
        (lambda: of("gemma3_text", **WIDE, query_pre_attn_scalar=16, attn_logit_softcapping=2.0),
         "attn_logit_softcapping = 2.0"),
        (lambda: of("smollm3", **GROUPED, no_rope_layers=[0, 1]), r"no_rope_layers = \[0, 1\]"),
        (lambda: of("llama", **GROUPED, rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
         "rotates 0.5 of each head .partial_rotary_factor."),
        (lambda: of("llama", **GROUPED, rope_parameters={**YARN, "rope_type": "dynamic"}), "by 'dynamic' .rope_type."),
        (lambda: of("gpt2", vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, n_head=4, scale_attn_weights=False),
         "scale_attn_weights = False"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say_is_refused_by_name(make, refusal, file):
    with pytest.raises(ModelError, match=refusal):
        write(file, build(make))
    assert not file.exists()


def test_mistrals_window_is_the_context(file):
    model = build(lambda: of("mistral", **GROUPED, sliding_window=24))
    draft = write(file, model)
    assert ["24 positions, the width of the model's window" in note for note in draft.notes] == [True]
    read = veneer.load(file)[0]
    assert read.config.max_position_embeddings == 24
    ids = torch.arange(24)[None] * 7
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=2e-5)


def test_rotations_of_llama_3_are_read_as_they_were(file):
    rope = {**LLAMA3, "factor": 32.0}
    sizes = {**GROUPED, "hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    write(file, build(lambda: of("llama", **sizes, rope_parameters=rope)))
    assert veneer.load(file)[0].config.rope_parameters == rope
