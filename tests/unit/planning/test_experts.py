"""A mixture's plan: its experts in codes and LoRA on them, by a count of bytes."""

from __future__ import annotations

import pytest
import transformers as tf

import tiny
import veneer
from tokens import tokenizer
from veneer.kernels import heap
from veneer.models.load import load
from veneer.planning.config import PlanOptions
from veneer.planning.ledger import KINDS
from veneer.planning.machine import Machine
from veneer.planning.plan import plan

pytestmark = pytest.mark.unit

RATES = {kind: 1e11 if kind in ("products", "attention") else 1e10 for kind in KINDS}
MACHINE = Machine(RATES, operation=1e-6, runtime=400 * 10**6, loading=390 * 10**6)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# Qwen/Qwen3-30B-A3B, its config.json.
LAYERS, WIDTH, EXPERTS, EXPERT, HEADS, KEYS, HEAD, WORDS = 48, 2048, 128, 768, 32, 4, 128, 151_936
# (out, in) of a layer's matrices, and how many of each there are
ATTENTION = [(HEADS * HEAD, WIDTH), (KEYS * HEAD, WIDTH), (KEYS * HEAD, WIDTH), (WIDTH, HEADS * HEAD)]
MIXTURE = [(2 * EXPERT, WIDTH), (WIDTH, EXPERT)]


def _config(folder, layers):
    """The config alone; no weight exists."""
    tf.Qwen3MoeConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=6144, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEYS, head_dim=HEAD, moe_intermediate_size=EXPERT,
        num_experts=EXPERTS, num_experts_per_tok=8, max_position_embeddings=40_960, tie_word_embeddings=False,
        norm_topk_prob=True, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def _plan_of(model, **options):
    return plan(PlanOptions(model=model, **{"batch_size": 1, "max_length": 64, **options}), MACHINE)


def _sums(layers, counted):
    """Of the linear layers and of the experts: the sum of ``counted(out, in)`` of each matrix."""
    attention = sum(counted(*shape) for shape in ATTENTION)
    return layers * attention, layers * EXPERTS * sum(counted(*shape) for shape in MIXTURE)


def _scales(rows, columns):
    """Of blocks of 64: one byte each, four of each 256 of them, and an offset."""
    blocks = rows * columns // 64
    return blocks + 4 * (blocks // 256) + 4


def test_qwen3_30b_a3b_is_planned_with_its_experts_in_codes_and_lora_on_them(tmp_path):
    made = _plan_of(_config(tmp_path, LAYERS), storage="nf4", target_parameters=BOTH)
    assert made.terms["base, codes"] == sum(_sums(LAYERS, lambda rows, columns: rows * columns // 2))
    assert made.terms["base, scales"] == sum(_sums(LAYERS, _scales))
    norms = LAYERS * (2 * WIDTH + 2 * HEAD) + WIDTH
    dense = 2 * WORDS * WIDTH + LAYERS * EXPERTS * WIDTH + norms  # embedding, head, routers, norms
    assert made.terms["base, dense"] == pytest.approx(4 * dense, abs=4096)  # and the rotation's frequencies
    base = sum(size for name, size in made.terms.items() if name.startswith("base"))
    assert base == pytest.approx(18.0e9, rel=0.02)  # it was 119e9, of which the experts took 116e9 in fp32
    assert made.parameters == sum(_sums(LAYERS, lambda rows, columns: 8 * (rows + columns)))
    assert made.terms["trained weights"] == 4 * made.parameters
    assert made.terms["optimizer states"] == 8 * made.parameters
    assert made.needed > base + 16 * made.parameters  # with their gradients


def test_experts_that_are_left_out_or_in_16_bits_take_what_they_take(tmp_path):
    model = _config(tmp_path, 2)
    left = _plan_of(model, storage="nf4", dense_storage="bf16")
    assert left.parameters == _sums(2, lambda rows, columns: 8 * (rows + columns))[0]
    assert left.terms["base, dense"] == pytest.approx(2 * 2 * WORDS * WIDTH, rel=0.01)
    whole = _plan_of(model, storage="bf16", target_parameters=BOTH)
    numbers = 2 * WORDS * WIDTH + sum(_sums(2, lambda rows, columns: rows * columns))
    assert whole.terms["base, dense"] == pytest.approx(2 * numbers, rel=0.01)
    assert whole.parameters == sum(_sums(2, lambda rows, columns: 8 * (rows + columns)))


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_mixture_takes_what_it_takes_when_it_is_loaded(name, storage, tmp_path, monkeypatch):
    monkeypatch.setattr(heap, "installed", lambda: True)
    tiny.build(name).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    made = _plan_of(str(tmp_path), storage=storage, target_parameters=BOTH, max_length=8)
    model, _ = load(tmp_path, storage)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert sum(size for term, size in made.terms.items() if term.startswith("base")) == held
    veneer.attach(model, veneer.LoRA(target_parameters=BOTH))
    assert made.parameters == veneer.trainable(model).parameters
    assert made.terms["trained weights"] == 4 * made.parameters
