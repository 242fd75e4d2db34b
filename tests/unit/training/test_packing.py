"""Rows back to back give what each gives alone: loss and gradients, on every architecture."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import tiny
import veneer
from veneer.data.labels import IGNORE, Tokens
from veneer.frozen.layers import compute_in
from veneer.training import packing
from veneer.training.loss import Loss
from veneer.training.packing import are_the_same, attention_by_rows

pytestmark = pytest.mark.unit

CAUSAL = [name for name in tiny.ARCHITECTURES if name not in ("bert", "t5")]


def _rows(lengths=(9, 4, 4, 21, 1, 6)):
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(1, tiny.VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Tokens(ids, [IGNORE] * min(2, length) + ids[2:], f"d:{number}"))
    return rows


def _adapted(name):
    model = tiny.build(name)
    veneer.attach(model, veneer.LoRA(rank=2))
    tiny.train_steps(model, tiny.batch(name), steps=1)
    return model


def _gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def _all_in_double(monkeypatch):
    """From here on what a model casts to fp32, such as a norm's input, stays in double precision."""
    own = torch.Tensor.to

    def to(self, *args, **kwargs):
        return own(self, *(torch.float64 if arg is torch.float32 else arg for arg in args), **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def _one_at_a_time(model, rows):
    """The sum over rows that have something to learn, by the model's own loss."""
    return sum(
        model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels])).loss * row.learned
        for row in rows
        if row.learned
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_are_those_of_one_row_at_a_time(name, checkpointing, monkeypatch):
    model, rows = _adapted(name).double(), _rows()  # in double precision only an error makes a difference
    loss = Loss(model, 0, rows[0], kind="causal")
    assert loss._packed
    _all_in_double(monkeypatch)
    wanted = _gradients(model, lambda: _one_at_a_time(model, rows))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():  # dropout alone would make the difference
            for rate in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
    with loss.attention():
        found = _gradients(model, lambda: loss(rows))
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_sliding_window_is_kept():
    config = tf.MistralConfig(**tiny._GROUPED, sliding_window=5)
    torch.manual_seed(0)
    model = tf.MistralForCausalLM(config).eval()
    rows = _rows((12, 12, 3))
    loss = Loss(model, 0, rows[0], kind="causal")
    assert loss._packed
    with torch.no_grad():
        torch.testing.assert_close(loss(rows), _one_at_a_time(model, rows), rtol=1e-5, atol=1e-5)


def test_the_models_own_attention_stands_again_afterwards():
    model, rows = _adapted("llama"), _rows()
    loss = Loss(model, 0, rows[0], kind="causal")
    with loss.attention():
        loss(rows)
        assert model.config._attn_implementation == "veneer_rows"
    assert model.config._attn_implementation == "sdpa"
    assert loss(rows[:2]) > 0
    assert model.config._attn_implementation == "sdpa"


def test_a_model_with_another_attention_pads_its_rows():
    model, rows = _adapted("llama"), _rows()
    model.set_attn_implementation("eager")
    loss = Loss(model, 0, rows[0], kind="causal")
    assert not loss._packed
    with torch.no_grad():
        torch.testing.assert_close(loss(rows), _one_at_a_time(model, rows), rtol=1e-5, atol=1e-5)


def test_a_model_that_passes_no_lengths_on_pads_its_rows():
    model, rows = _adapted("llama"), _rows()
    body = model.model.forward
    model.model.forward = lambda row_lengths=None, **kwargs: body(**kwargs)
    assert not Loss(model, 0, rows[0], kind="causal")._packed


@pytest.mark.parametrize("name", CAUSAL)
def test_in_16_bits_the_same_models_pack(name):
    model, rows = _adapted(name), _rows()
    assert Loss(model.bfloat16(), 0, rows[0], kind="causal")._packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["one row of all tokens", "positions that go on"])
def test_a_model_that_mixes_rows_pads_them_in_16_bits_too(fault, dtype):
    model, rows = _adapted("llama").to(dtype), _rows()
    body = model.model.forward

    def mixing(row_lengths=None, position_ids=None, input_ids=None, **kwargs):
        if row_lengths is not None:
            if fault.startswith("one"):
                row_lengths = (sum(row_lengths),)
            else:
                position_ids = 400 * torch.arange(input_ids.shape[1])[None]
        return body(row_lengths=row_lengths, position_ids=position_ids, input_ids=input_ids, **kwargs)

    model.model.forward = mixing
    assert not Loss(model, 0, rows[0], kind="causal")._packed


def test_an_option_that_is_not_known_is_refused():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(TypeError, match="softcap"):
        attention_by_rows(torch.nn.Module(), q, q, q, None, row_lengths=(4,), softcap=30.0)


class _Attending:
    """A backend that has attention, or has not; the operator's own is whichever serves here."""

    def __init__(self, does):
        self.attends = lambda dtype, dim: does and dtype is torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"scaling": 0.2}, {"sliding_window": 5}, {"sliding_window": 50}])
@pytest.mark.parametrize("lengths", [(12,), (4, 4, 1, 3), (7, 5)])
def test_rows_attend_in_one_call_as_in_groups(lengths, options, monkeypatch):
    drawn = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, heads, 12, 16, generator=drawn).bfloat16() for heads in (4, 2, 2)]

    def outputs(dtype, at_once):
        monkeypatch.setattr(packing, "backend_of", lambda device: _Attending(at_once))
        made = [x.to(dtype).requires_grad_() for x in parts]
        y, _ = attention_by_rows(torch.nn.Module(), *made, None, row_lengths=lengths, dropout=0.0, **options)
        return y, *torch.autograd.grad(y.square().sum(), made)

    wanted, found = outputs(torch.float32, False), outputs(torch.bfloat16, True)
    assert [x.dtype for x in found] == [torch.bfloat16] * 4
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 2e-2 * other.norm()
    # fp32 goes by groups all the same, to the bit.
    assert all(torch.equal(*pair) for pair in zip(outputs(torch.float32, True), wanted, strict=True))


def test_attention_drops_out_by_groups(monkeypatch):
    monkeypatch.setattr(packing, "backend_of", lambda device: _Attending(True))
    q = torch.randn(1, 2, 12, 16).bfloat16()
    y, _ = attention_by_rows(torch.nn.Module(), q, q, q, None, row_lengths=(12,), dropout=0.9)
    whole, _ = attention_by_rows(torch.nn.Module(), q, q, q, None, row_lengths=(12,), dropout=0.0)
    assert (y - whole).norm() > 0.1 * whole.norm()


def test_a_packed_step_in_bf16_has_the_gradients_of_fp32():
    config = tf.LlamaConfig(**{**tiny._GROUPED, "hidden_size": 64})
    torch.manual_seed(0)
    model, rows = tf.LlamaForCausalLM(config), _rows((33, 20, 20, 5))
    veneer.attach(model, veneer.LoRA(rank=2))
    tiny.train_steps(model, tiny.batch("llama"), steps=1)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        loss = Loss(model, 0, rows[0], kind="causal")
        assert loss._packed
        with loss.attention():
            found.append(torch.cat([g.flatten().float() for g in _gradients(model, lambda: loss(rows))]))  # noqa: B023
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99


def test_the_cost_of_attention_grows_with_the_squares_of_the_rows(monkeypatch):
    """Scores, queries times keys: 32 tokens in rows of 16 and 8 have fewer than in one row."""
    scores = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, v, **options):
        scores.append(q.shape[0] * q.shape[2] * k.shape[2])
        return plain(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    q = torch.randn(1, 2, 32, 8)
    for lengths, wanted in (((32,), [1024]), ((16, 8, 8), [256, 128]), ((8, 16, 8), [64, 256, 64])):
        scores.clear()
        y, _ = attention_by_rows(torch.nn.Module(), q, q, q, None, row_lengths=lengths)
        assert scores == wanted
        assert y.shape == (1, 32, 2, 8)


@pytest.mark.parametrize("name", CAUSAL)
def test_in_bf16_a_model_packs_where_it_does_in_fp32(name):
    """Rounding, which is another one with other threads and shapes, is no reason not to."""
    sample, found = Tokens([5, 9, 3, 7], [IGNORE, 9, 3, 7], ""), []
    for compute in (torch.float32, torch.bfloat16):
        model = tiny.build(name)
        if compute is not torch.float32:
            compute_in(model, compute)
        found.append(Loss(model, 0, sample, kind="causal").how)
    assert found[0] == found[1]


def test_vectors_in_16_bits_may_differ_by_their_rounding():
    wanted = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    near, far = wanted + 0.02 * wanted.flip(0), wanted + 0.3 * wanted.flip(0)
    assert are_the_same(wanted, wanted)
    assert not are_the_same(near, wanted)
    assert are_the_same(near.bfloat16(), wanted.bfloat16())
    assert are_the_same(near.bfloat16(), wanted)
    assert not are_the_same(far.bfloat16(), wanted.bfloat16())
