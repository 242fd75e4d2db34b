"""What vLLM's own checks let an adapter be: each rule by its value, and the names of the lists are transformers'."""

from __future__ import annotations

import pytest
import transformers

from veneer.reporting.loading import LoadedBy, ways_to_load
from veneer.reporting.vllm_rules import WITH_EMBEDDINGS, WITHOUT_ADAPTERS, max_rank, why_merged

pytestmark = pytest.mark.unit

Q, HEAD, EMBEDDING = "model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"


@pytest.mark.parametrize(
    ("rank", "taken"), [(0, 8), (1, 8), (8, 8), (9, 16), (33, 64), (129, 256), (257, 320), (321, 512), (512, 512)]
)
def test_the_least_choice_that_holds_the_largest_rank(rank, taken):
    assert max_rank({Q: rank, "model.layers.0.self_attn.v_proj": 0}) == taken
    assert why_merged({Q: rank}, "LlamaForCausalLM") == ""


@pytest.mark.parametrize(
    ("ranks", "family", "reason"),
    [
        ({Q: 513}, "LlamaForCausalLM", "vLLM takes ranks up to 512, and this is 513, so the adapter is merged first."),
        ({"transformer.h.0.attn.c_attn": 8}, "GPT2LMHeadModel", "vLLM takes no adapters of GPT2LMHeadModel, so this "
         "one is merged first."),
        ({HEAD: 8, EMBEDDING: 8, Q: 8}, "Qwen3ForCausalLM", "Not every vLLM takes an update of embed_tokens and "
         "lm_head of Qwen3ForCausalLM, so the adapter is merged first."),
        ({EMBEDDING: 8}, "", "Not every vLLM takes an update of embed_tokens of some models, so the adapter is merged "
         "first."),
        ({HEAD: 8, EMBEDDING: 8}, "LlamaForCausalLM", ""),
        ({Q: 8}, "Qwen3ForCausalLM", ""),
        ({Q: 8}, "", ""),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_merged(ranks, family, reason):
    assert why_merged(ranks, family) == reason


def test_the_lists_are_of_classes_of_transformers():
    assert not [name for name in WITHOUT_ADAPTERS | WITH_EMBEDDINGS if not hasattr(transformers, name)]
    assert not WITHOUT_ADAPTERS & WITH_EMBEDDINGS


def _vllm(fields, ranks, family="LlamaForCausalLM"):
    adapter = LoadedBy(
        {"task_type": "CAUSAL_LM", **fields}, ranks, "someone/base", "run", "run/adapter", "run/merged", "run/plain",
        "first", [], {"storage": "fp32", "block_size": 64}, None, family,
    )  # fmt: skip
    return next(recipe for recipe in ways_to_load(adapter) if recipe.title == "vLLM")


MERGED = ["veneer merge run run/merged", "vllm serve run/merged"]
SERVED = [
    "vllm serve someone/base --enable-lora --max-lora-rank 16 \\",
    "    --lora-modules first=run/",
]


@pytest.mark.parametrize(
    ("fields", "lines"),
    [
        ({"peft_type": "LORA"}, [SERVED[0], f"{SERVED[1]}adapter"]),
        ({"use_rslora": True}, ["veneer export run run/plain", SERVED[0], f"{SERVED[1]}plain"]),
        ({"rank_pattern": {"q_proj": 12}}, ["veneer export run run/plain", SERVED[0], f"{SERVED[1]}plain"]),
        ({"alpha_pattern": {"q_proj": 12}}, ["veneer export run run/plain", SERVED[0], f"{SERVED[1]}plain"]),
        ({"peft_type": "ADALORA"}, ["veneer export run run/plain", SERVED[0], f"{SERVED[1]}plain"]),
        ({"use_dora": True}, MERGED),
        ({"modules_to_save": ["lm_head"]}, MERGED),
        ({"trainable_token_indices": {"embed_tokens": [7]}}, MERGED),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, MERGED),
    ],
)
def test_the_commands(fields, lines):
    assert _vllm(fields, {Q: 12}).parts[0][1].splitlines() == lines


def test_the_reason_is_said_with_the_commands():
    recipe = _vllm({}, {"transformer.h.0.attn.c_attn": 8}, "GPT2LMHeadModel")
    assert recipe.parts[0][1].splitlines() == MERGED
    assert recipe.note == "vLLM takes no adapters of GPT2LMHeadModel, so this one is merged first."
